"""An image and its labels cropped and mirrored together: after it, a label cell covers what it covered before."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch.nn import functional as F

from shards.rng import CROP, FLIP, uniform

TRIES = 10


def sample_flips(
    seed: int, epochs: Int64[np.ndarray, " batch"], indices: Int64[np.ndarray, " batch"]
) -> Bool[np.ndarray, " batch"]:
    """Which images are mirrored: every other one on average."""
    return uniform(seed, epochs, indices, FLIP, 1)[:, 0] < 0.5


def sample_boxes(
    seed: int, epochs: Int64[np.ndarray, " batch"], indices: Int64[np.ndarray, " batch"], *, size: int, scale: float
) -> Int64[np.ndarray, "batch 4"]:
    """Random resized crops as torchvision draws them (area in [scale, 1], log-uniform ratio in [3/4, 4/3], ten
    tries, else the whole image), as x0, y0, width, height in pixels of the stored square."""
    draws = uniform(seed, epochs, indices, CROP, 4 * TRIES).reshape(-1, TRIES, 4).astype(np.float64)
    area = size**2 * (scale + (1 - scale) * draws[..., 0])
    ratio = np.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[..., 1])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width <= size) & (height <= size) & (width > 0) & (height > 0)
    chosen = np.where(fits.any(axis=1), fits.argmax(axis=1), -1)
    x0, y0 = np.floor(draws[..., 2] * (size - width + 1)), np.floor(draws[..., 3] * (size - height + 1))
    boxes = np.stack([x0, y0, width, height], axis=-1)[np.arange(len(indices)), chosen].astype(np.int64)
    return np.where((chosen < 0)[:, None], np.array([0, 0, size, size]), boxes)


def crop_into(
    pixels: UInt8[np.ndarray, "height width 3"],
    box: tuple[int, int, int, int],
    row: UInt8[np.ndarray, "height width 3"],
) -> None:
    """The box of `pixels`, resized to fill `row` (bicubic, antialiased, torch's uint8 kernel)."""
    x0, y0, width, height = box
    cut = torch.from_numpy(pixels).permute(2, 0, 1)[None, :, y0 : y0 + height, x0 : x0 + width]
    size = (row.shape[0], row.shape[1])
    resized = F.interpolate(cut, size, mode="bicubic", antialias=True, align_corners=False)
    torch.from_numpy(row).copy_(resized[0].permute(1, 2, 0))


def crop_cells(cells: np.ndarray, box: tuple[int, int, int, int], *, size: int) -> np.ndarray:
    """The label cells [..., rows, cols] of a crop: each the one under its centre."""
    x0, y0, width, height = box
    grid = cells.shape[-1]
    centres = (np.arange(grid) + 0.5) / grid
    rows = ((y0 + centres * height) / size * grid).astype(np.int64)
    cols = ((x0 + centres * width) / size * grid).astype(np.int64)
    return cells[..., rows[:, None], cols[None, :]]


def reranked(fgrank: np.ndarray) -> np.ndarray:
    """Ranks that repeat or have gaps, as a permutation again: same order, ties by place."""
    order = np.argsort(fgrank, axis=None, kind="stable")
    ranks = np.empty(fgrank.size, fgrank.dtype)
    ranks[order] = np.arange(fgrank.size, dtype=fgrank.dtype)
    return ranks.reshape(fgrank.shape)
