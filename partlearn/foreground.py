"""Which cells are the object: scorers of foreground, and the rank that is stored."""

import zlib
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from encoders.frozen import Tokens
from shards.rng import TIES, uniform

Scorer = Literal["contrast", "border", "component", "cut", "attention"]
LINKED = 0.2
"""Least cosine of two cells that the cut's graph links, as in TokenCut."""
LEAST, MOST = 0.1, 0.6
"""Shares of the cells between which an object's size may lie."""
KEPT = 0.25
"""Share of the cells that masking takes for the object, where confidence is asked for."""


def foreground_score(tokens: Tokens, scorer: Scorer) -> Float[Tensor, "batch patches"]:
    """Higher is more likely foreground. `contrast` by default: best or near it with both encoders that were tried, at
    the cost of three products; learned maps rank below the centre prior (partlearn/RESULTS.md)."""
    if scorer == "attention":
        return tokens.class_attention.mean(dim=1)
    if scorer == "contrast":
        return contrast(tokens.patch_tokens)
    border = border_distance(tokens.patch_tokens)
    if scorer == "border":
        return border
    score = first_component(tokens.patch_tokens) if scorer == "component" else normalised_cut(tokens.patch_tokens)
    away = border - border.mean(dim=1, keepdim=True)
    return score * torch.where((score * away).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)


def border_distance(tokens: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches"]:
    """1 - cos(token, mean token of the image's border cells): objects rarely fill the border."""
    side = round(tokens.shape[1] ** 0.5)
    border = F.normalize(tokens[:, border_cells(side, tokens.device)].mean(dim=1, keepdim=True), dim=-1)
    return 1 - (F.normalize(tokens, dim=-1) * border).sum(dim=-1)


def contrast(tokens: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches"]:
    """cos(token, mean token of the object) - cos(token, mean token of the rest), the object found by `border_distance`
    and Otsu's threshold: one step of k-means with two centres, begun at the border.

    Where the border holds several things, or some of its cells hold sums of the whole image (ViT-Tiny's corners), the
    mean of all that is no object is the better ground.
    """
    unit = F.normalize(tokens, dim=-1)
    cells = object_cells(border_distance(tokens), None)[..., None].to(unit.dtype)
    thing, ground = (F.normalize((unit * mine).sum(dim=1, keepdim=True), dim=-1) for mine in (cells, 1 - cells))
    return (unit * (thing - ground)).sum(dim=-1)


def first_component(tokens: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches"]:
    """Place of each unit token along the direction in which the image's tokens vary most; its sign means nothing."""
    unit = F.normalize(tokens.float(), dim=-1)
    centred = unit - unit.mean(dim=1, keepdim=True)
    direction = torch.linalg.eigh(centred.transpose(1, 2) @ centred).eigenvectors[:, :, -1]
    return (centred @ direction[:, :, None]).squeeze(2)


def normalised_cut(tokens: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches"]:
    """The second generalised eigenvector of (D - W) y = λ D y, W linking cells of cosine above LINKED (TokenCut,
    arXiv:2202.11539, Eq. 3); centred, its sign means nothing.

    Costs an eigendecomposition of patches x patches an image: a second for four images of 784 cells on a CPU.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    weights = torch.where(unit @ unit.transpose(1, 2) > LINKED, 1.0, 1e-5)
    root = weights.sum(dim=2).sqrt()
    vectors = torch.linalg.eigh(weights / (root[:, :, None] * root[:, None])).eigenvectors
    cut = vectors[:, :, -2] / root
    return cut - cut.mean(dim=1, keepdim=True)


def border_cells(side: int, device: torch.device | None = None) -> Int64[Tensor, " cells"]:
    """Indices of the outermost ring of a side x side grid, made where they are used: nothing waits for the device."""
    first, last = torch.arange(side, device=device), side * (side - 1)
    inner = side * torch.arange(1, side - 1, device=device)
    return torch.cat([first, first + last, inner, inner + side - 1]).sort().values


def tie_noise(tokens: Tokens, draws: int) -> Float[Tensor, "batch draws"]:
    """Numbers in [0, 1) that tell equal attention apart, keyed by the bits of an image's class token: by index, ties
    would always be in favour of the top left."""
    rows = tokens.class_token.float().cpu().numpy()
    keys = np.array([zlib.crc32(row.tobytes()) for row in rows], np.int64)
    return torch.from_numpy(uniform(0, np.zeros_like(keys), keys, TIES, draws)).to(tokens.class_token.device)


def ties_of(tokens: Tokens, scorer: Scorer | Literal["maps"]) -> Float[Tensor, "batch patches"] | None:
    """What `foreground_rank` and `object_cells` need to rank by `scorer`: noise where that is attention."""
    return tie_noise(tokens, tokens.patch_tokens.shape[1]) if scorer == "attention" else None


def falling(
    values: Float[Tensor, "*rows patches"], noise: Float[Tensor, "*rows patches"] | None = None
) -> Int64[Tensor, "*rows patches"]:
    """Indices from the greatest value down; of equals the one of the lowest noise first, or of the lowest index."""
    if noise is None:
        return values.argsort(dim=-1, descending=True, stable=True)
    shuffled = noise.argsort(dim=-1, stable=True)
    return shuffled.gather(-1, falling(values.gather(-1, shuffled)))


def foreground_rank(
    score: Float[Tensor, "batch patches"], noise: Float[Tensor, "batch patches"] | None = None
) -> Int64[Tensor, "batch patches"]:
    """0 for the cell most likely foreground, up to patches - 1; equal scores go by `noise`, without it by index."""
    order = falling(score, noise)
    ranks = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def inside(rank: Int64[Tensor, "batch patches"], share: float) -> Bool[Tensor, "batch patches"]:
    """The best `share` of the cells, at least one."""
    return rank < max(1, round(share * rank.shape[1]))


def object_cells(
    score: Float[Tensor, "batch patches"], share: float | None, noise: Float[Tensor, "batch patches"] | None = None
) -> Bool[Tensor, "batch patches"]:
    """The object: the best `share` of the cells, or, without one, those above the image's own threshold (`otsu`)."""
    rank = foreground_rank(score, noise)
    return rank < otsu(score)[:, None] if share is None else inside(rank, share)


def otsu(score: Float[Tensor, "batch patches"]) -> Int64[Tensor, " batch"]:
    """How many cells lie above the threshold that leaves most variance between the two groups (Otsu 1979): the k, from
    LEAST to MOST of the P cells, that maximises k (P - k) (mean of the best k - mean of the rest)².

    Objects are of different sizes: against a fixed 35 %, the IoU with the true object rises from .72 to .86 on people
    and from .57 to .63 on cars, and labels of two crops of a photograph agree better (docs/log.md).
    """
    ordered = score.sort(dim=1, descending=True).values
    cells = score.shape[1]
    count = torch.arange(1, cells, device=score.device)
    above, total = ordered.cumsum(dim=1)[:, :-1], ordered.sum(dim=1, keepdim=True)
    between = count * (cells - count) * (above / count - (total - above) / (cells - count)).square()
    allowed = (count >= max(1, round(LEAST * cells))) & (count <= max(1, round(MOST * cells)))
    return count[between.masked_fill(~allowed, -1.0).argmax(dim=1)]


def confidence(
    tokens: Float[Tensor, "batch patches dim"], rank: Int64[Tensor, "batch patches"]
) -> Float[Tensor, " batch"]:
    """That there is an object, from 0 to 2: how much further the best KEPT of the cells lies from the border's mean
    token than the rest does. Any image ranks its cells; where all of it is background, they lie close together."""
    distance, kept = border_distance(tokens), inside(rank, KEPT)
    best = (distance * kept).sum(dim=1) / kept.sum(dim=1)
    rest = (distance * ~kept).sum(dim=1) / (~kept).sum(dim=1).clamp(min=1)
    return (best - rest).clamp(0, 2)
