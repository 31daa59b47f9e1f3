"""The views that one step shows, drawn for the whole batch so that any number of ranks sees the same."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from encoders.distill.config import EncoderConfig
from training.augment import crop, jitter_colour, normalised, random_places, step_generator, unit
from training.block_masks import block_masks

GLOBAL_SCALE, LOCAL_SCALE = (0.35, 1.0), (0.08, 0.35)
GLOBAL_CROPS = 2
JITTER = 0.4


@dataclass(frozen=True, slots=True)
class Crops:
    """What one step of self-distillation shows: crop after crop of the whole batch."""

    global_crops: Float[Tensor, "global_crops 3 size size"]
    local_crops: Float[Tensor, "local_crops 3 local_size local_size"]
    masks: Bool[Tensor, "global_crops patches"]
    masked: tuple[Int64[Tensor, " masked"], Int64[Tensor, " masked"]]
    """Crop and patch of each masked one: found before they are on the device, which otherwise is waited for."""


def sample_crops(
    images: UInt8[Tensor, "batch height width 3"],
    config: EncoderConfig,
    *,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> Crops:
    """The crops of one rank's block of the batch, a pure function of the images, the seed and the step."""
    generator = step_generator(config.seed, step)
    block = {"generator": generator, "rank": rank, "world_size": world_size}
    pixels = unit(images)

    def views(count: int, size: int, scale: tuple[float, float]) -> Float[Tensor, "crops 3 size size"]:
        drawn = [pixels.new_empty(0, 3, size, size)]
        for _ in range(count):
            boxes, flip = random_places(pixels, scale=scale, **block)
            drawn.append(normalised(jitter_colour(crop(pixels, boxes, size, flip), strength=JITTER, **block)))
        return torch.cat(drawn)

    global_crops = views(GLOBAL_CROPS, config.size, GLOBAL_SCALE)
    local_crops = views(config.local_crops, config.local_size, LOCAL_SCALE)
    whole = GLOBAL_CROPS * world_size * len(images)
    masks = block_masks(whole, config.size // config.patch, share=config.mask_ratio, generator=generator)
    mine = masks.unflatten(0, (GLOBAL_CROPS, world_size, -1))[:, rank].flatten(0, 1)
    crop_of, patch_of = (index.to(pixels.device, non_blocking=True) for index in mine.nonzero(as_tuple=True))
    return Crops(global_crops, local_crops, mine.to(pixels.device, non_blocking=True), (crop_of, patch_of))


def sample_pair(
    images: UInt8[Tensor, "batch height width 3"],
    sizes: tuple[int, int],
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Float[Tensor, "batch 3 first first"], Float[Tensor, "batch 3 second second"]]:
    """One crop of each image in other colours, at two sizes and in [0, 1]; pure as `sample_crops` is."""
    block = {"generator": step_generator(seed, step), "rank": rank, "world_size": world_size}
    pixels = unit(images)
    boxes, flip = random_places(pixels, scale=GLOBAL_SCALE, **block)
    coloured = jitter_colour(pixels, strength=JITTER, **block)
    return crop(coloured, boxes, sizes[0], flip), crop(coloured, boxes, sizes[1], flip)
