"""MAE's fixed positions: sines and cosines of the column, then of the row (timm's own table is another one)."""

import torch
from jaxtyping import Float
from torch import Tensor


def sincos_positions(dim: int, side: int) -> Float[Tensor, "1 tokens dim"]:
    """Positions of a class token (zeros) and side x side patches; `dim` is a multiple of 4.

        first half: column,  second half: row;  each  [sin(x w_k), cos(x w_k)],  w_k = 10000^(-k / (dim/4))

    MAE, arXiv:2111.06377; probes fall far short of the paper's without it (facebookresearch/mae issue 39).
    """
    frequency = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns = axis.repeat(side, 1)
    rows = axis.repeat_interleave(side, dim=0)
    patches = torch.cat([columns, rows], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches])[None].float()
