"""Masks in blocks: their share, and that they are blocks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.block_masks import block_masks


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(grid=st.integers(2, 14), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_masks_mask_exactly_their_share(grid, share, seed):
    masks = block_masks(3, grid, share=share, generator=seeded(seed))

    assert (masks.sum(dim=1) == round(share * grid * grid)).all()


def test_masks_come_in_blocks():
    masks = block_masks(200, 12, share=0.3, generator=seeded()).reshape(-1, 12, 12)

    neighbour_hidden = masks[:, :, 1:][masks[:, :, :-1]].float().mean()

    assert neighbour_hidden > 0.6  # 0.3 if patches were masked one by one
