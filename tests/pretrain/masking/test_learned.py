"""What every masking keeps to that learns: as the others, whatever its weights are."""

import dataclasses

import pytest
import torch
from some_inputs import TINY, inputs_of

from pretrain.masking.inputs import Inputs
from pretrain.objective import LEARNED, new_masking
from pretrain.train import build


def masked_sets(inputs: Inputs, progress: float) -> list[set[int]]:
    masking = new_masking(inputs.config, build(inputs.config, 8 * inputs.shape[0]), 3)
    assert masking is not None
    masks = masking.masked(inputs, progress)
    for visible, masked, kept in zip(masks.ids_visible, masks.ids_masked, inputs.kept, strict=True):
        assert sorted([*visible.tolist(), *masked.tolist()]) == kept.tolist()
    return [set(row) for row in masks.ids_masked.tolist()]


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("ratio", [0.4, 0.75, 0.9])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_a_learned_masking_masks_its_budget_of_the_kept_patches(name, ratio, share, progress):
    inputs = inputs_of(name, images=2, shape=(7, 7), mask_ratio=ratio, keep_share=share, **TINY)
    kept = inputs.kept.shape[1]

    masks = masked_sets(inputs, progress)

    assert {len(mask) for mask in masks} == {kept - int(kept * (1 - ratio))}


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_mask_is_the_same_alone_and_in_any_batch(name):
    inputs = inputs_of(name, images=4, shape=(7, 7), **TINY)
    names = ("images", "parts", "fgrank", "class_ids", "indices", "epochs", "attn", "attn_peak")

    together = masked_sets(inputs, 0.7)

    for row in range(4):
        one = {name: getattr(inputs.batch, name)[row : row + 1] for name in names}
        assert masked_sets(dataclasses.replace(inputs, batch=dataclasses.replace(inputs.batch, **one)), 0.7) == [
            together[row]
        ]


@pytest.mark.parametrize("name", LEARNED)
def test_every_image_epoch_and_seed_has_draws_of_its_own_where_a_masking_learns(name):
    alike = inputs_of(name, images=2, shape=(7, 7), **TINY)
    for of_image in (
        alike.batch.images,
        alike.batch.parts,
        alike.batch.fgrank,
        alike.batch.attn,
        alike.batch.attn_peak,
    ):
        of_image[1] = of_image[0]
    another = dataclasses.replace(alike, seed=1)
    later = dataclasses.replace(alike, batch=dataclasses.replace(alike.batch, epochs=alike.batch.epochs + 1))

    masks = [mask for inputs in (alike, another, later) for mask in masked_sets(inputs, 0.5)]

    assert len({tuple(sorted(mask)) for mask in masks}) == len(masks)


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
