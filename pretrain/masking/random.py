"""MAE's masking (arXiv:2111.06377): patches at random; or SimMIM's (arXiv:2111.09886): squares of them."""

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.masking.inputs import Inputs
from shards.rng import MASK


def scores(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """Noise; of squares of --mask-unit patches where that is above 1. `progress` changes nothing."""
    unit = inputs.config.mask_unit
    if unit == 1:
        return inputs.noise
    rows, cols = inputs.shape
    across = -(-cols // unit)
    square = (torch.arange(rows)[:, None] // unit * across + torch.arange(cols) // unit).flatten().to(inputs.device)
    noise = inputs.uniform(MASK, rows * cols)  # a square has that of its number; the last is cut by that of its patches
    return inputs.of_kept(noise[:, square].double() + noise.double() * 2.0**-25)
