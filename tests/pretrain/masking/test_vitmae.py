"""Any mask goes to Hugging Face's ViTMAE as its `noise`.

It is not a dependency, so the test has its documented semantics; the model itself was tried in transformers 5.24.0.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_inputs import MASKINGS, inputs_of, of, scores_of
from torch import Tensor

from pretrain.masking.batch import masked_by, noise_for_vitmae


def shown_by_vitmae(noise: Tensor, mask_ratio: float) -> list[set[int]]:
    """The int(L (1 - r)) patches of the lowest noise (ViTMAEEmbeddings.random_masking)."""
    length = noise.shape[1]
    return [set(row[: int(length * (1 - mask_ratio))]) for row in noise.argsort(dim=1).tolist()]


@pytest.mark.parametrize("name", MASKINGS)
@settings(max_examples=15)
@given(ratio=st.sampled_from([0.4, 0.6, 0.75, 0.9]), progress=st.floats(0, 1), seed=st.integers(0, 9))
def test_vitmae_shows_the_patches_that_we_show(name, ratio, progress, seed):
    inputs = of(name, images=3, shape=(7, 7), seed=seed, mask_ratio=ratio)
    scores = scores_of(inputs, progress)

    noise = noise_for_vitmae(scores)

    visible = masked_by(scores, inputs).ids_visible
    assert shown_by_vitmae(noise, ratio) == [set(row) for row in visible.tolist()]


def test_scores_that_are_all_alike_still_give_one_mask():
    inputs = inputs_of("random", images=2, shape=(28, 28))
    alike = torch.zeros(2, 784)

    noise = noise_for_vitmae(alike)

    assert [sorted(row) for row in noise.tolist()] == [list(range(784))] * 2
    assert shown_by_vitmae(noise, 0.75) == [set(row) for row in masked_by(alike, inputs).ids_visible.tolist()]
