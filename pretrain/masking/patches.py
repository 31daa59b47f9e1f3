"""Stored cells to patches, for any number of either: labels by majority of area, ranks and attention by its mean."""

import math
from functools import cache

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Shape = tuple[int, int]
"""Patches of an image, rows by columns."""


def pool_labels(parts: UInt8[Tensor, "batch cell_rows cell_cols"], shape: Shape) -> Int64[Tensor, "batch patches"]:
    """The label that covers most of each patch, of equals the lower one: that of the greatest
    256 · area + 255 - label."""
    rows, cols = parts.shape[1:]
    small = _whole(rows, shape[0]) * _whole(cols, shape[1]) < 128
    dtype = torch.int16 if small else torch.int32
    pieces = [(label, area.to(dtype) * 256) for label, area in _pieces(parts, shape)]
    votes = [area + 255 - label for label, area in pieces]
    for one, (label, area) in enumerate(pieces):
        for two in range(one + 1, len(pieces)):
            same = label == pieces[two][0]
            votes[one] += same * pieces[two][1]
            votes[two] += same * area
    return (255 - torch.stack(votes).amax(dim=0) % 256).long()


def pool_mean(
    values: Float[Tensor, "batch *heads cell_rows cell_cols"], shape: Shape
) -> Float[Tensor, "batch *heads patches"]:
    """The mean of `values` over the area of each patch. Sums run in one order: the same bits on any device."""
    rows, cols = values.shape[-2:]
    down, across = rows // shape[0], cols // shape[1]
    if (rows, cols) == (down * shape[0], across * shape[1]):  # the same bits from slices, 30 times as fast
        cells = [values[..., row::down, col::across] for row in range(down) for col in range(across)]
        return (sum(cells[1:], start=cells[0]) / len(cells)).flatten(-2)
    total = sum((piece * area for piece, area in _pieces(values, shape)), start=values.new_zeros(()))
    return total / (_whole(rows, shape[0]) * _whole(cols, shape[1]))


def best_patches(
    fgrank: Int64[Tensor, "batch cell_rows cell_cols"], shape: Shape, share: float
) -> Int64[Tensor, "batch kept"]:
    """Indices of the `share` of patches best in foreground, ascending; ties to the lower index."""
    rank = pool_mean(fgrank.double(), shape)
    return rank.argsort(dim=1, stable=True)[:, : kept_count(shape, share)].sort(dim=1).values


def kept_count(shape: Shape, share: float) -> int:
    """How many of rows x cols patches take part; 196 of 784 at a quarter."""
    return max(1, round(share * shape[0] * shape[1]))


@cache
def _pieces_of(cells: Shape, shape: Shape) -> list[tuple[Int64[Tensor, " patches"], Int64[Tensor, " patches"]]]:
    """The cells that a patch touches, one cell of every patch at a time, with the area it has of that patch."""
    down, across = _overlaps(cells[0], shape[0]), _overlaps(cells[1], shape[1])
    return [
        ((rows[:, None] * cells[1] + cols).flatten(), (height[:, None] * width).flatten())
        for rows, height in zip(*down, strict=True)
        for cols, width in zip(*across, strict=True)
    ]


def _pieces(cells: Tensor, shape: Shape) -> list[tuple[Tensor, Tensor]]:
    """The values of those cells [..., patches], and the areas."""
    rows, cols = cells.shape[-2:]
    flat = cells.flatten(-2)
    return [
        (flat.index_select(-1, index.to(cells.device)), area.to(cells.device))
        for index, area in _pieces_of((rows, cols), shape)
    ]


@cache
def _overlaps(cells: int, patches: int) -> tuple[list[Int64[Tensor, " patches"]], list[Int64[Tensor, " patches"]]]:
    """Along one side: the first, second, ... cell that each patch touches, and how much of it, as whole numbers that
    sum to `_whole` for every patch. Where a patch touches fewer than another, its last cell comes again with 0.

    28 cells, 14 patches: cells 0 and 1, 2 and 3, ..., with 1 and 1. 28 cells, 16 patches: 4 and 3; 1, 4 and 2; ...
    """
    unit = math.gcd(cells, patches)
    length, step = cells // unit, patches // unit  # of a patch, and of a cell
    start = torch.arange(patches) * length
    first = start // step
    last = (start + length - 1) // step
    indices, areas = [], []
    for place in range(int((last - first).max()) + 1):
        cell = first + place
        overlap = torch.minimum(start + length, (cell + 1) * step) - torch.maximum(start, cell * step)
        indices.append(torch.minimum(cell, last))
        areas.append(overlap.clamp(min=0))
    return indices, areas


def _whole(cells: int, patches: int) -> int:
    return cells // math.gcd(cells, patches)
