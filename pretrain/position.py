"""MAE's fixed positions: sines and cosines of the column, then of the row (timm's own table is another one)."""

import torch
from jaxtyping import Float
from torch import Tensor


def sincos_positions(dim: int, rows: int, cols: int) -> Float[Tensor, "1 tokens dim"]:
    """Positions of a class token (zeros) and of rows x cols patches, row by row; `dim` is a multiple of 4.

        first half: column,  second half: row;  each  [sin(x w_k), cos(x w_k)],  w_k = 10000^(-k / (dim/4))

    MAE, arXiv:2111.06377; its code calls the first half the height's, and fills it with columns. Probes fall far short
    of the paper's without this table (facebookresearch/mae issue 39).
    """
    frequency = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    columns, lines = (_along(count, frequency) for count in (cols, rows))
    patches = torch.cat([columns.repeat(rows, 1), lines.repeat_interleave(cols, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches])[None].float()


def _along(count: int, frequency: Float[Tensor, " rates"]) -> Float[Tensor, "count half"]:
    angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
