"""What the maskings that learn keep to beside what all do (test_strategies.py)."""

import dataclasses

import pytest
import torch
from some_inputs import TINY, inputs_of

from pretrain.objective import LEARNED, new_masking
from pretrain.train import build


@pytest.mark.parametrize("name", LEARNED)
def test_first_weights_are_drawn_from_the_seed_and_leave_torchs_own_draws_alone(name):
    config = inputs_of(name, **TINY).config
    torch.manual_seed(3)
    before = torch.get_rng_state()

    drawn = [new_masking(dataclasses.replace(config, seed=seed), build(config, 32), 3) for seed in (0, 0, 1)]

    one, same, other = ([weight for weight in masking.parameters() if weight.requires_grad] for masking in drawn)
    assert all(torch.equal(*pair) for pair in zip(one, same, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
