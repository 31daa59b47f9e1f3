"""Which patches are masked: functions of labels and noise, with the same count in every row.

Randomness enters as numbers. Keyed by (seed, epoch, image), they give an image the same mask on any number of
ranks, in any order and after any resume.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pretrain.masking.budget import masked_count


def alpha_at(progress: float, gamma: float) -> float:
    """Algorithm 1, line 7, with continuous progress from 0 to 1: alpha = progress ** gamma.

    The released code divides the epoch by a fixed 800, so that a run of 100 epochs would end at 0.016.
    """
    return min(1.0, max(0.0, progress)) ** gamma


def semantic_masking(
    labels: Int64[Tensor, "batch patches"],
    noise: Float[Tensor, "batch patches"],
    part_order: Float[Tensor, "batch groups"],
    *,
    mask_ratio: float,
    alpha: float,
) -> Bool[Tensor, "batch patches"]:
    """SemMAE's masking (arXiv:2206.10207, Algorithm 1): M patches masked, shared out over the parts, and inside a
    part those of least noise; True = masked.

    Args:
        labels: Part of each patch, below `groups`; parts may be empty.
        noise: In [0, 1); picks the patches inside a part.
        part_order: Noise that orders the parts; the lowest goes first when parts are masked whole.
        alpha: 0 masks the same share of every part, 1 masks whole parts.
    """
    groups = part_order.shape[1]
    sizes = torch.zeros(len(labels), groups, dtype=torch.int64, device=labels.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    order = part_order.argsort(dim=1, stable=True)
    masked = masked_per_part(sizes, order, masked_count(labels.shape[1], mask_ratio), alpha)
    sequence = (2 * labels + noise).argsort(dim=1, stable=True)
    place = sequence.argsort(dim=1)
    before = sizes.cumsum(dim=1) - sizes
    return place - before.gather(1, labels) < masked.gather(1, labels)


def masked_per_part(
    sizes: Int64[Tensor, "batch groups"], order: Int64[Tensor, "batch groups"], masked: int, alpha: float
) -> Int64[Tensor, "batch groups"]:
    """How many patches of each part are masked; a row sums to `masked` exactly.

        num1 = n · M / L                               the same share of every part        (line 1)
        num2 = min(n, max(0, M - sum of the parts before it))    whole parts in `order`    (lines 2 to 6)
        num  = (1 - alpha) · num1 + alpha · num2                                           (line 8)

    The paper rounds, and its counts then miss the budget in every other image. Here the floors are kept and the
    largest remainders get one more, ties to the lower part: num <= n and only num < n has a remainder, so no part
    overflows.
    """
    patches = sizes.sum(dim=1, keepdim=True).clamp(min=1)
    inside = sizes.double() * masked / patches
    permuted = sizes.gather(1, order)
    left = (masked - (permuted.cumsum(dim=1) - permuted)).clamp(min=0)
    whole = torch.zeros_like(sizes).scatter_(1, order, torch.minimum(left, permuted))
    wanted = (1 - alpha) * inside + alpha * whole
    floors = (wanted + 1e-9).floor()
    remainders = ((wanted - floors) * 1e9).round()  # ties of exact arithmetic stay ties
    missing = masked - floors.sum(dim=1, keepdim=True)
    rank = remainders.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (floors + (rank < missing)).long()
