"""Which cells are the object: scorers of foreground, and the rank that is stored."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from partlearn.encoders import Tokens

Scorer = Literal["border", "attention"]


def foreground_score(tokens: Tokens, scorer: Scorer) -> Float[Tensor, "batch patches"]:
    """Higher is more likely foreground. `border` by default: learned maps rank below the centre prior, and this
    wins on every set with truth (docs/log.md)."""
    return border_distance(tokens.patch_tokens) if scorer == "border" else tokens.class_attention.mean(dim=1)


def border_distance(tokens: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches"]:
    """1 - cos(token, mean token of the picture's border cells): objects rarely fill the border."""
    side = round(tokens.shape[1] ** 0.5)
    border = F.normalize(tokens[:, border_cells(side)].mean(dim=1, keepdim=True), dim=-1)
    return 1 - (F.normalize(tokens, dim=-1) * border).sum(dim=-1)


def border_cells(side: int) -> Int64[Tensor, " cells"]:
    """Indices of the outermost ring of a side x side grid."""
    edge = torch.zeros(side, side, dtype=torch.bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    return edge.flatten().nonzero().squeeze(1)


def foreground_rank(score: Float[Tensor, "batch patches"]) -> Int64[Tensor, "batch patches"]:
    """0 for the cell most likely foreground, up to patches - 1; equal scores go by index."""
    order = score.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def inside(rank: Int64[Tensor, "batch patches"], share: float) -> Bool[Tensor, "batch patches"]:
    """The best `share` of the cells, at least one."""
    return rank < max(1, round(share * rank.shape[1]))
