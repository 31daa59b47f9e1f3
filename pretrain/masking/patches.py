"""Stored grids to patches: labels by majority, and the patches best in foreground."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


def pool_labels(parts: Int64[Tensor, "batch rows cols"], side: int, groups: int) -> Int64[Tensor, "batch patches"]:
    """Majority label of the cells of each patch, ties to the lower label.

    Raises:
        ValueError: The patches do not divide the cells evenly.
    """
    block = _block(parts.shape[1], side)
    if block == 1:
        return parts.flatten(1)
    votes = F.one_hot(parts, groups).permute(0, 3, 1, 2).float()
    counts = F.avg_pool2d(votes, block) * block**2
    order = torch.arange(groups, device=parts.device).reshape(1, -1, 1, 1)
    return (counts.round() * groups - order).argmax(dim=1).flatten(1)


def pool_rank(fgrank: Int64[Tensor, "batch rows cols"], side: int) -> Float[Tensor, "batch patches"]:
    """Mean foreground rank of the cells of each patch; lower is more likely foreground."""
    return F.avg_pool2d(fgrank.float()[:, None], _block(fgrank.shape[1], side)).flatten(1)


def best_patches(fgrank: Int64[Tensor, "batch rows cols"], side: int, share: float) -> Int64[Tensor, "batch kept"]:
    """Indices of the `share` of patches best in foreground, ascending; ties to the lower index."""
    rank = pool_rank(fgrank, side)
    return rank.argsort(dim=1, stable=True)[:, : kept_count(side, share)].sort(dim=1).values


def kept_count(side: int, share: float) -> int:
    """How many of side x side patches take part; 196 of 784 at a quarter."""
    return max(1, round(share * side * side))


def split(
    kept: Int64[Tensor, "batch kept"], mask: Tensor
) -> tuple[Int64[Tensor, "batch visible"], Int64[Tensor, "batch masked"]]:
    """Patch indices the encoder sees and those it does not; every row of `mask` masks the same count."""
    order = mask.long().argsort(dim=1, stable=True)
    visible = int((~mask[0]).sum())
    ordered = kept.gather(1, order)
    return ordered[:, :visible], ordered[:, visible:]


def _block(cells: int, side: int) -> int:
    if cells % side:
        raise ValueError(
            f"labels of {cells}x{cells} cells cannot be shared by {side}x{side} patches; choose --patch so that "
            f"patches a side divide {cells}, or extract with another --grid"
        )
    return cells // side
