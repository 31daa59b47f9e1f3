"""BEiT's masking (arXiv:2106.08254, Algorithm 1): rectangles, one after another."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from pretrain.masking.budget import masked_count
from pretrain.masking.inputs import Inputs
from pretrain.masking.patches import Shape
from shards.rng import BLOCK

LEAST = 16
"""Patches of the smallest rectangle that is asked for, while so many are left; a twelfth of fewer than 196 patches."""
ASPECT = math.log(1 / 0.3)
"""The logarithm of height over width is within plus and minus this."""
FAILURES = 10
"""Rectangles in a row that do not fit, after which no further one is tried."""
TRIES = 64
"""Rectangles that are tried at most; few images of 28x28 patches come so far."""


def scores(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """Noise, less 1 inside the rectangles. They cover at most the share of all patches that is to be masked, and the
    rest is filled up at random, where BEiT masks fewer. With --keep-share below 1 more of the kept patches than are to
    be masked may be inside; noise then chooses among those. `progress` changes nothing."""
    patches = inputs.shape[0] * inputs.shape[1]
    draws = inputs.uniform(BLOCK, 4 * TRIES).unflatten(1, (TRIES, 4)).cpu().numpy()
    covered = rectangles(draws, inputs.shape, masked_count(patches, inputs.config.mask_ratio))
    return inputs.noise - inputs.of_kept(torch.from_numpy(covered).flatten(1).to(inputs.device)).float()


def rectangles(
    draws: Float32[np.ndarray, "batch tries 4"], shape: Shape, budget: int
) -> Bool[np.ndarray, "batch rows cols"]:
    """The patches under the rectangles, `budget` at most, on the host: its exp is not a GPU's.

    A rectangle is laid where it adds something and no more than is left. Its area is uniform from LEAST to what is
    left, its place uniform, its aspect uniform in the logarithm.

    Args:
        draws: In [0, 1): area, aspect, top and left side of each.
    """
    rows, cols = shape
    least = max(1, min(LEAST, rows * cols // 12))
    area, aspect, top, start = np.moveaxis(draws.astype(np.float64), 2, 0)
    stretch = np.exp((2 * aspect - 1) * ASPECT)
    covered = np.zeros((len(draws), rows, cols), np.float32)
    left, failures = np.full(len(draws), budget), np.zeros(len(draws), np.int64)
    going = np.arange(len(draws))
    for attempt in range(draws.shape[1]):
        wanted = least + (left[going] - least) * area[going, attempt]
        height = np.sqrt(wanted * stretch[going, attempt]).round()
        width = np.sqrt(wanted / stretch[going, attempt]).round()
        down = _segment(top[going, attempt], height, rows)[:, :, None]
        across = _segment(start[going, attempt], width, cols)[:, None]
        there = covered[going]
        added = (height * width - (across @ there.swapaxes(1, 2) @ down)[:, 0, 0]).astype(np.int64)
        fits = (height < rows) & (width < cols) & (added > 0) & (added <= left[going])
        covered[going] = np.maximum(there, down * across * fits[:, None, None])
        left[going] -= added * fits
        failures[going] = (failures[going] + 1) * ~fits
        going = going[(left[going] > 0) & (failures[going] < FAILURES)]
        if not len(going):
            break
    return covered > 0


def _segment(
    place: Float[np.ndarray, " images"], length: Float[np.ndarray, " images"], side: int
) -> Float32[np.ndarray, "images side"]:
    """1 where a segment of each image is, at `place` of the room that it has."""
    start = np.floor(place * (side - length + 1))[:, None]
    places = np.arange(side)
    return ((places >= start) & (places < start + length[:, None])).astype(np.float32)
