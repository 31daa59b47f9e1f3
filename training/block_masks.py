"""Which patches the student does not see: rectangles, to an exact count."""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

RECTANGLES = 12


def block_masks(batch: int, grid: int, *, share: float, generator: torch.Generator) -> Bool[Tensor, "batch patches"]:
    """True = masked; exactly `round(share · grid²)` patches of every image.

    Rectangles of random place, area and aspect are laid one after another until the budget is spent; the last
    one is taken in part, in random order. BEiT (arXiv:2106.08254, algorithm 1) draws until at least the budget
    is covered; an exact count keeps batches rectangular, and drawing all at once keeps the loop out of Python.
    """
    masked = round(share * grid * grid)
    area, aspect, left, top = torch.rand(4, batch, RECTANGLES, generator=generator)
    area = (4 + (max(4, masked / 2) - 4) * area).clamp(max=grid * grid)
    aspect = ((2 * aspect - 1) * math.log(3)).exp()
    width, height = (area * aspect).sqrt().clamp(1, grid), (area / aspect).sqrt().clamp(1, grid)
    columns = _inside(left, width.round(), grid)[:, :, None, :]
    rows = _inside(top, height.round(), grid)[:, :, :, None]
    covered = (columns & rows).flatten(2)
    first = torch.where(covered, torch.arange(RECTANGLES)[:, None], RECTANGLES).amin(dim=1)
    order = (first + torch.rand(batch, grid * grid, generator=generator)).argsort(dim=1)
    return torch.zeros(batch, grid * grid, dtype=torch.bool).scatter_(1, order[:, :masked], True)


def _inside(place: Tensor, length: Tensor, grid: int) -> Bool[Tensor, "batch rectangles grid"]:
    """Cells of one axis that a segment of whole length, at `place` of its free range, covers."""
    start = (place * (grid - length + 1)).floor()[..., None]
    cell = torch.arange(grid)
    return (cell >= start) & (cell < start + length[..., None])
