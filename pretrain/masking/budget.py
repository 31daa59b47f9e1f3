"""How many patches are masked, which are, and how whole the masked parts are."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def masked_count(patches: int, mask_ratio: float) -> int:
    """M: MAE keeps int(L (1 - r)) patches and masks the rest; 147 of 196 at 0.75."""
    return patches - int(patches * (1 - mask_ratio))


def lowest(scores: Float[Tensor, "batch patches"], count: int) -> Bool[Tensor, "batch patches"]:
    """The `count` patches of each row with the lowest scores, of equals the first; True = masked."""
    last = _nth_lowest(scores, count)
    below, equal = scores < last, scores == last
    left = count - below.sum(dim=1, keepdim=True)
    return below | (equal & (equal.cumsum(dim=1) <= left))


def sorted_rows(keys: Int64[Tensor, "batch patches"]) -> Int64[Tensor, "batch patches"]:
    """Each row in ascending order. On a CPU NumPy sorts whole numbers ten times as fast as PyTorch."""
    if keys.device.type == "cpu":
        return torch.from_numpy(np.sort(keys.numpy(), axis=1))
    return keys.sort(dim=1).values


def _nth_lowest(scores: Float[Tensor, "batch patches"], count: int) -> Float[Tensor, "batch 1"]:
    """See `sorted_rows`."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.partition(scores.numpy(), count - 1, axis=1)[:, count - 1 : count])
    return scores.kthvalue(count, dim=1, keepdim=True).values


def purity_and_touched(
    mask: Bool[Tensor, "batch patches"], labels: Int64[Tensor, "batch patches"], groups: int
) -> Float[Tensor, "2"]:
    """Of the non-empty parts: the share that is masked whole or not at all (near 0 at alpha 0, at least (K-1)/K at 1),
    and the share of which anything is masked (all at alpha 0, about three quarters at 1)."""
    sizes = torch.zeros(len(labels), groups, dtype=torch.int64, device=labels.device)
    masked = sizes.scatter_add(1, labels, mask.long())
    sizes = sizes.scatter_add(1, labels, torch.ones_like(labels))
    there = sizes > 0
    counted = torch.stack([((masked == 0) | (masked == sizes)) & there, masked > 0]).sum(dim=(1, 2))
    return counted / there.sum().clamp(min=1)
