"""Tokens relative to their image, and the whitening of tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def centred_tokens(
    tokens: Float[Tensor, "batch patches dim"], inside: Bool[Tensor, "batch patches"]
) -> Float[Tensor, "batch patches dim"]:
    """What a token is within its image: less the mean of the inside cells. Raw tokens spend the parts on classes."""
    return tokens - mean_token(tokens, inside)[:, None]


def mean_token(
    tokens: Float[Tensor, "batch patches dim"], inside: Bool[Tensor, "batch patches"]
) -> Float[Tensor, "batch dim"]:
    """The mean of each image's inside cells; 0 where there are none."""
    weight = inside[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def whitening_of(points: Float[Tensor, "points dim"], width: int) -> Float[Tensor, "dim width"]:
    """The whitening of points around their mean: parts are in directions of small variance (partlearn/RESULTS.md)."""
    centred = (points - points.mean(dim=0)).double()
    return whitening_from(centred.T @ centred / len(points), width).to(points.dtype)


def whitening_from(covariance: Float[Tensor, "dim dim"], width: int) -> Float[Tensor, "dim width"]:
    """The `width` leading principal directions, each divided by the deviation along it.

    Or by a hundredth of the largest deviation, where it is less: of few points, some directions hold nothing to see.
    """
    variances, directions = torch.linalg.eigh(covariance.double())
    least = max(1e-4 * variances[-1].item(), 1e-12)
    return (directions[:, -width:] / variances[-width:].clamp(min=least).sqrt()).to(covariance.dtype)
