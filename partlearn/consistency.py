"""Parts that keep to the object however its image is cropped, mirrored and lit."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from encoders.frozen import Encoder, Tokens
from training.augment import crop, jitter_colour, random_places, unit

SCALE, JITTER = (0.4, 1.0), 0.4


@dataclass(frozen=True, slots=True)
class Again:
    """The same images seen again: a box of each, mirrored or not, in other colours."""

    tokens: Tokens
    boxes: Float[Tensor, "batch 4"]
    flip: Bool[Tensor, " batch"]


def second_view(
    pixels: UInt8[Tensor, "batch height width 3"],
    encoder: Encoder,
    *,
    generator: torch.Generator,
    rank: int = 0,
    world_size: int = 1,
) -> Again:
    """A second view of one rank's block of a batch: the draws of the step's generator that follow those of the first,
    the same on every rank."""
    block = {"generator": generator, "rank": rank, "world_size": world_size}
    whole = unit(pixels)
    boxes, flip = random_places(whole, scale=SCALE, **block)
    lit = crop(jitter_colour(whole, strength=JITTER, **block), boxes, encoder.size, flip)
    return Again(encoder((255 * lit).round().byte().permute(0, 2, 3, 1)), boxes, flip)


def consistency_loss(
    maps: Float[Tensor, "batch parts patches"],
    cells: Bool[Tensor, "batch patches"],
    again: Float[Tensor, "batch parts patches"],
    again_cells: Bool[Tensor, "batch patches"],
    boxes: Float[Tensor, "batch 4"],
    flip: Bool[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Half the squared distance between a cell's shares of the parts in both views: 0 where they agree, 1 where each
    view is sure of another part. Mean over the second view's cells that are inside in both."""
    grid = round(maps.shape[2] ** 0.5)
    square = torch.cat([shares(maps), cells[:, None].to(maps.dtype)], dim=1).unflatten(2, (grid, grid))
    moved = crop(square, boxes, grid, flip).flatten(2)
    both = (moved[:, -1] > 0.99) & again_cells
    apart = (moved[:, :-1] - shares(again)).square().sum(dim=1) / 2
    return (apart * both).sum() / both.sum().clamp(min=1)


def shares(maps: Float[Tensor, "batch parts patches"]) -> Float[Tensor, "batch parts patches"]:
    """Maps that sum to 1 over the parts."""
    return maps / maps.sum(dim=1, keepdim=True).clamp(min=1e-6)
