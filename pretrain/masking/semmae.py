"""SemMAE's masking (arXiv:2206.10207, Algorithm 1): from inside parts to whole parts."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pretrain.masking.budget import sorted_rows
from pretrain.masking.config import MaskingConfig
from pretrain.masking.inputs import Inputs
from shards.rng import PART_ORDER

RELEASED_EPOCHS = 800
"""By which the released code divides the epoch, however long the run is."""


def alpha_at(progress: float, config: MaskingConfig, epoch: int = 0) -> float:
    """Algorithm 1, line 7: how far masks are from inside parts (0) to whole parts (1).

        rising     t ** gamma                   t: progress, from 0 to 1, by step
        falling    (1 - t) ** gamma             the paper's control (Table 3)
        cosine     (1 - cos(pi t)) / 2          the other curve in the released code
        released   ((epoch + 1) / 800) ** gamma     a run of 100 epochs ends at 0.016

    Args:
        epoch: The image's, from 0; it matters to `released` alone.
    """
    if config.alpha is not None:
        return config.alpha
    progress = min(1.0, max(0.0, progress))
    if config.curriculum == "falling":
        return (1 - progress) ** config.gamma
    if config.curriculum == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    if config.curriculum == "released":
        return min(1.0, (epoch + 1) / RELEASED_EPOCHS) ** config.gamma
    return progress**config.gamma


def scores(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """From three quarters of every part to three quarters of the parts, as `progress` goes from 0 to 1."""
    config, part_order = inputs.config, inputs.uniform(PART_ORDER, inputs.groups)
    alphas = [alpha_at(progress, config, epoch) for epoch in inputs.batch.epochs.tolist()]
    alpha = torch.tensor(alphas, dtype=torch.float64, device=inputs.device)[:, None]
    masked, ratio = inputs.masked, config.mask_ratio
    if config.rounding == "released":
        return released_scores(inputs.labels, inputs.noise, part_order, mask_ratio=ratio, alpha=alpha)
    return semantic_scores(inputs.labels, inputs.noise, part_order, masked=masked, alpha=alpha)


def semantic_scores(
    labels: Int64[Tensor, "batch patches"],
    noise: Float[Tensor, "batch patches"],
    part_order: Float[Tensor, "batch groups"],
    *,
    masked: int,
    alpha: Float[Tensor, "batch 1"] | float,
) -> Float[Tensor, "batch patches"]:
    """SemMAE's masking (arXiv:2206.10207, Algorithm 1): a patch's place inside its part, by noise, less the number of
    patches that are masked of that part. Exactly `masked` scores of a row are negative, because the numbers of its
    parts sum to that.

    Args:
        labels: Part of each patch, below `groups`; parts may be empty.
        noise: In [0, 1), of 24 bits; orders the patches inside a part.
        part_order: Noise that orders the parts; the lowest goes first when parts are masked whole.
        alpha: 0 masks the same share of every part, 1 masks whole parts.
    """
    sizes = sizes_of(labels, part_order.shape[1])
    order = part_order.argsort(dim=1, stable=True)
    quota = masked_per_part(sizes, order, masked, alpha)
    return (place_inside(labels, noise, sizes) - quota.gather(1, labels)).float()


def released_scores(
    labels: Int64[Tensor, "batch patches"],
    noise: Float[Tensor, "batch patches"],
    part_order: Float[Tensor, "batch groups"],
    *,
    mask_ratio: float,
    alpha: Float[Tensor, "batch 1"] | float,
) -> Float[Tensor, "batch patches"]:
    """The same as the authors' code rounds it (`random_masking_setting3`): r n of every part is rounded, whole parts
    are counted against L r cut to a whole number, their blend is rounded again, all halves to even.

    The counts of a row may then miss M. The code sorts patches, in the order of their noise, by whether they are to be
    masked, and shows the first L - M: so too many are shown from the front, too few are made up from the front. (It
    sorts unstably; which of equals comes first is left open there, and here is by noise.)
    """
    patches = labels.shape[1]
    sizes = sizes_of(labels, part_order.shape[1])
    order = part_order.argsort(dim=1, stable=True)
    inside = (sizes.double() * mask_ratio).round()
    permuted = sizes.gather(1, order)
    left = (patches * mask_ratio - permuted.cumsum(dim=1) + permuted).long().clamp(min=0)
    whole = torch.zeros_like(sizes).scatter_(1, order, torch.minimum(left, permuted))
    quota = ((1 - alpha) * inside + alpha * whole).round().long()
    to_mask = place_inside(labels, noise, sizes) < quota.gather(1, labels)
    turn = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return -(to_mask * patches + turn).float()


def sizes_of(labels: Int64[Tensor, "batch patches"], groups: int) -> Int64[Tensor, "batch groups"]:
    """Patches in each part."""
    sizes = torch.zeros(len(labels), groups, dtype=torch.int64, device=labels.device)
    return sizes.scatter_add_(1, labels, torch.ones_like(labels))


def place_inside(
    labels: Int64[Tensor, "batch patches"],
    noise: Float[Tensor, "batch patches"],
    sizes: Int64[Tensor, "batch groups"],
) -> Int64[Tensor, "batch patches"]:
    """How many patches of its own part come before a patch by noise, of equals by index."""
    patches = labels.shape[1]
    places = torch.arange(patches, device=labels.device)
    keys = sorted_rows((labels << 24 | (noise * 2.0**24).long()) * patches + places)
    before = sizes.cumsum(dim=1) - sizes
    sequence = keys % patches
    return torch.empty_like(keys).scatter_(1, sequence, places.expand_as(keys)) - before.gather(1, labels)


def masked_per_part(
    sizes: Int64[Tensor, "batch groups"],
    order: Int64[Tensor, "batch groups"],
    masked: int,
    alpha: Float[Tensor, "batch 1"] | float,
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
