"""ColorMAE's masking (arXiv:2407.13036): noise of one band of spatial frequencies."""

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.masking.inputs import Inputs
from shards.rng import COLOR

NARROW, WIDE = 0.5, 2.0
"""Deviations, in patches, of the two Gaussians."""
REACH = 5
"""Patches on each side that a filter sees."""
ONE = 1 << 12
"""What the taps of a filter sum to. They are whole, as the noise is, so that sums are exact on any device."""


def scores(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """Filtered white noise W, whose highest values stay visible; with Gaussian filters G of NARROW and WIDE deviation,

        red = G_wide(W)    blue = W - G_wide(W)    green = G_narrow(W) - G_wide(W)    purple = W - green

    The noise goes on beyond the image, as in a crop of a larger one. `progress` changes nothing.
    """
    rows, cols = (side + 2 * REACH for side in inputs.shape)
    white = (inputs.uniform(COLOR, rows * cols).double() * 2**24).unflatten(1, (rows, cols))
    whole = ONE**2 * white[:, REACH:-REACH, REACH:-REACH]
    narrow, wide = filtered(white, NARROW), filtered(white, WIDE)
    color = {"red": wide, "blue": whole - wide, "green": narrow - wide, "purple": whole - narrow + wide}
    return inputs.of_kept(color[inputs.config.noise_color].flatten(1))


def filtered(noise: Float[Tensor, "batch far_rows far_cols"], deviation: float) -> Float[Tensor, "batch rows cols"]:
    """A Gaussian along rows and columns, REACH patches less on each side; of whole numbers below 2**53, so exact."""
    down, across = (band(side - 2 * REACH, deviation).to(noise.device) for side in noise.shape[1:])
    return down @ noise @ across.T


@cache
def band(side: int, deviation: float) -> Float[Tensor, "side far_side"]:
    """Row i has a Gaussian's taps from column i on: 2 · REACH + 1 whole numbers that sum to ONE."""
    bell = [math.exp(-0.5 * (x / deviation) ** 2) for x in range(-REACH, REACH + 1)]
    taps = [round(ONE * value / sum(bell)) for value in bell]
    taps[REACH] += ONE - sum(taps)
    rows = [[0] * row + taps + [0] * (side - 1 - row) for row in range(side)]
    return torch.tensor(rows, dtype=torch.float64)
