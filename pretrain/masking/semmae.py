"""SemMAE's masking (arXiv:2206.10207, Algorithm 1): from inside parts to whole parts."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pretrain.masking.inputs import Inputs
from shards.rng import PART_ORDER


def alpha_at(progress: float, gamma: float) -> float:
    """Algorithm 1, line 7, with continuous progress from 0 to 1: alpha = progress ** gamma.

    The released code divides the epoch by a fixed 800, so that a run of 100 epochs would end at 0.016.
    """
    return min(1.0, max(0.0, progress)) ** gamma


def scores(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """From three quarters of every part to three quarters of the parts, as `progress` goes from 0 to 1."""
    part_order = inputs.uniform(PART_ORDER, inputs.groups)
    alpha = alpha_at(progress, inputs.gamma)
    return semantic_scores(inputs.labels, inputs.noise, part_order, masked=inputs.masked, alpha=alpha)


def semantic_scores(
    labels: Int64[Tensor, "batch patches"],
    noise: Float[Tensor, "batch patches"],
    part_order: Float[Tensor, "batch groups"],
    *,
    masked: int,
    alpha: float,
) -> Float[Tensor, "batch patches"]:
    """SemMAE's masking (arXiv:2206.10207, Algorithm 1): a patch's place inside its part, by noise, less the number of
    patches that are masked of that part. Exactly `masked` scores of a row are negative, because the numbers of its
    parts sum to that.

    Args:
        labels: Part of each patch, below `groups`; parts may be empty.
        noise: In [0, 1); orders the patches inside a part.
        part_order: Noise that orders the parts; the lowest goes first when parts are masked whole.
        alpha: 0 masks the same share of every part, 1 masks whole parts.
    """
    groups = part_order.shape[1]
    sizes = torch.zeros(len(labels), groups, dtype=torch.int64, device=labels.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    order = part_order.argsort(dim=1, stable=True)
    quota = masked_per_part(sizes, order, masked, alpha)
    sequence = (2 * labels + noise).argsort(dim=1, stable=True)
    before = sizes.cumsum(dim=1) - sizes
    place = sequence.argsort(dim=1) - before.gather(1, labels)
    return (place - quota.gather(1, labels)).float()


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
    wanted = (1 - alpha) * inside + alpha * whole.double()
    floors = (wanted + 1e-9).floor()
    remainders = ((wanted - floors) * 1e9).round()  # ties of exact arithmetic stay ties
    missing = masked - floors.sum(dim=1, keepdim=True)
    rank = remainders.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (floors + (rank < missing)).long()
