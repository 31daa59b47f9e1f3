"""How many patches are masked, and how whole the masked parts are."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def masked_count(patches: int, mask_ratio: float) -> int:
    """M: MAE keeps int(L (1 - r)) patches and masks the rest; 147 of 196 at 0.75."""
    return patches - int(patches * (1 - mask_ratio))


def lowest(scores: Float[Tensor, "batch patches"], count: int) -> Bool[Tensor, "batch patches"]:
    """The `count` patches of each row with the lowest scores, of equals the first; True = masked."""
    return scores.argsort(dim=1, stable=True).argsort(dim=1) < count


def purity(
    mask: Bool[Tensor, "batch patches"], labels: Int64[Tensor, "batch patches"], groups: int
) -> Float[Tensor, ""]:
    """Share of non-empty parts that are masked whole or not at all: near 0 at alpha 0, at least (K-1)/K at 1."""
    sizes = torch.zeros(len(labels), groups, dtype=torch.int64, device=labels.device)
    masked = sizes.scatter_add(1, labels, mask.long())
    sizes = sizes.scatter_add(1, labels, torch.ones_like(labels))
    there = sizes > 0
    return (((masked == 0) | (masked == sizes)) & there).sum() / there.sum().clamp(min=1)
