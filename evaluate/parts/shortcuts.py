"""Maps that know nothing of parts: position and colour. What does not beat them has found no parts."""

import numpy as np
from jaxtyping import Float, Int64, UInt8

COLOURS = 6


def bands(grid: int, count: int) -> Int64[np.ndarray, "grid grid"]:
    """`count` horizontal bands, numbered from the top: row · count // grid."""
    return np.repeat((np.arange(grid) * count // grid)[:, None], grid, axis=1).astype(np.int64)


def centre_prior(grid: int) -> Float[np.ndarray, "grid grid"]:
    """Minus the distance of a cell from the centre, in cells: higher is more likely foreground."""
    offset = np.arange(grid) - (grid - 1) / 2
    return -np.hypot(offset[:, None], offset[None, :])


def darkness(images: UInt8[np.ndarray, "images side side 3"], grid: int) -> Float[np.ndarray, "images grid grid"]:
    """1 - mean of the three channels: dark cells first."""
    return 1 - cell_colours(images, grid).mean(axis=-1)


def border_distance_rgb(
    images: UInt8[np.ndarray, "images side side 3"], grid: int
) -> Float[np.ndarray, "images grid grid"]:
    """Distance of a cell's mean colour from the mean colour of the outermost ring of cells."""
    colours = cell_colours(images, grid)
    edge = np.ones((grid, grid), dtype=bool)
    edge[1:-1, 1:-1] = False
    return np.linalg.norm(colours - colours[:, edge].mean(axis=1)[:, None, None], axis=-1)


def cell_colours(images: UInt8[np.ndarray, "images side side 3"], grid: int) -> Float[np.ndarray, "images grid grid 3"]:
    """Mean colour of each cell, between 0 and 1; pixel y is in row y · grid // side."""
    side = images.shape[1]
    if side < grid:
        raise ValueError(f"images must be at least {grid} pixels wide for {grid} cells a side, got {side}")
    starts = -(-np.arange(grid) * side // grid)
    sums = np.stack(  # an image at a time: all of them as 64-bit sums would not fit
        [np.add.reduceat(np.add.reduceat(image, starts, axis=0, dtype=np.int64), starts, axis=1) for image in images]
    )
    heights = np.diff(np.append(starts, side))
    return sums / (255.0 * heights[:, None, None] * heights[None, :, None])


def colour_clusters(
    images: UInt8[np.ndarray, "images side side 3"], grid: int, count: int = COLOURS
) -> Int64[np.ndarray, "images grid grid"]:
    """Each cell's cluster by k-means on mean RGB over all images.

    Lloyd's algorithm, 20 rounds, from `count` colours spread by farthest-first choice: no randomness at all.
    """
    colours = cell_colours(images, grid)
    points = colours.reshape(-1, 3)
    centres = points.mean(axis=0, keepdims=True)
    reach = ((points - centres) ** 2).sum(axis=1)
    centres = points[[reach.argmax()]]
    while len(centres) < count:
        reach = _squared_distances(points, centres).min(axis=1)
        centres = np.concatenate([centres, points[[reach.argmax()]]])
    for _ in range(20):
        nearest = _squared_distances(points, centres).argmin(axis=1)
        sizes = np.bincount(nearest, minlength=count)
        for axis in range(3):
            sums = np.bincount(nearest, weights=points[:, axis], minlength=count)
            centres[:, axis] = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres[:, axis])
    return _squared_distances(points, centres).argmin(axis=1).reshape(colours.shape[:3])


def _squared_distances(
    points: Float[np.ndarray, "points 3"], centres: Float[np.ndarray, "centres 3"]
) -> Float[np.ndarray, "points centres"]:
    return ((points**2).sum(axis=1)[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)).clip(min=0)
