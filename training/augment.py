"""Batched crops, mirroring and colours of images on any device, and the statistics they are normalised by."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_boxes(
    batch: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator,
) -> Float[Tensor, "batch 4"]:
    """Boxes (x0, y0, x1, y1) in unit coordinates, as torchvision's RandomResizedCrop draws them.

    Area uniform in `scale`, aspect log-uniform in `ratio`, place uniform. A side longer than the image is cut
    to it, where torchvision draws again: no loop, and boxes near the whole image stay near it.
    """
    area, aspect, left, top = torch.rand(4, batch, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * area
    low, high = torch.tensor(ratio).log()
    aspect = (low + (high - low) * aspect).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x0, y0 = left * (1 - width), top * (1 - height)
    return torch.stack([x0, y0, x0 + width, y0 + height], dim=1)


def crop(
    images: Float[Tensor, "batch channels height width"],
    boxes: Float[Tensor, "batch 4"],
    size: int,
    flip: Bool[Tensor, " batch"],
) -> Float[Tensor, "batch channels size size"]:
    """One box of each image at `size` pixels, mirrored where `flip`: bilinear samples at the new pixels' centres.

    Bilinear sampling skips pixels where a box shrinks more than twofold; such images are halved by averaging
    first, as often as that takes. Boxes that are on the CPU cost a device no wait.
    """
    _, _, height, width = images.shape
    x0, y0, x1, y1 = boxes.unbind(1)
    shrink = torch.maximum((x1 - x0) * width, (y1 - y0) * height) / size
    halvings = (shrink.log2().ceil() - 1).clamp(min=0).long()
    sign = 1 - 2 * flip.to(images.dtype)
    zero = torch.zeros_like(x0)
    # Maps the output square [-1, 1]² onto the box, where the image too is [-1, 1]².
    rows_x = torch.stack([(x1 - x0) * sign, zero, x0 + x1 - 1], dim=1)
    rows_y = torch.stack([zero, y1 - y0, y0 + y1 - 1], dim=1)
    theta = _sent(torch.stack([rows_x, rows_y], dim=1), images)
    cropped = images.new_empty(*images.shape[:2], size, size)
    for level in halvings.unique().tolist():
        chosen = _sent((halvings == level).nonzero().squeeze(1), images)
        source = F.avg_pool2d(images[chosen], 2**level) if level else images[chosen]
        where = F.affine_grid(theta[chosen], [*source.shape[:2], size, size], align_corners=False)
        cropped[chosen] = F.grid_sample(source, where, padding_mode="border", align_corners=False)
    return cropped


def jitter_colour(
    images: Float[Tensor, "batch 3 height width"],
    *,
    strength: float,
    generator: torch.Generator,
    rank: int = 0,
    world_size: int = 1,
) -> Float[Tensor, "batch 3 height width"]:
    """Brightness, contrast and saturation of each image times 1 ± strength, grey with probability 0.2.

    Each image in [0, 1] draws its own factors; the order is fixed, and values are clamped at the end. The images
    are one rank's block of a batch, for the whole of which the factors are drawn.
    """
    mine = slice(rank * len(images), (rank + 1) * len(images))
    draws = torch.rand(4, world_size * len(images), 1, 1, 1, generator=generator)[:, mine]
    draws = _sent(draws, images)
    brightness, contrast, saturation = 1 + strength * (2 * draws[:3] - 1)
    saturation = torch.where(draws[3] < 0.2, 0.0, saturation)
    bright = images * brightness
    grey = luma(bright)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    # Contrast and saturation are linear and commute: both move a pixel towards a grey.
    return (mean + contrast * (grey + saturation * (bright - grey) - mean)).clamp(0, 1)


def luma(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Grey as ITU-R BT.601 weighs it."""
    weights = _sent(torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype).reshape(3, 1, 1), images)
    return (images * weights).sum(dim=1, keepdim=True)


def random_places(
    pixels: Float[Tensor, "batch 3 height width"],
    *,
    scale: tuple[float, float],
    generator: torch.Generator,
    rank: int,
    world_size: int,
) -> tuple[Float[Tensor, "batch 4"], Bool[Tensor, " batch"]]:
    """Boxes, and whether to mirror them, of one rank's block of the batch; on the CPU."""
    count = len(pixels)
    boxes = random_boxes(world_size * count, scale=scale, generator=generator)
    flip = torch.rand(world_size * count, generator=generator) < 0.5
    mine = slice(rank * count, (rank + 1) * count)
    return boxes[mine], flip[mine]


def unit(images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    """Bytes as pixels in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def normalised(
    pixels: Float[Tensor, "batch 3 height width"],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float[Tensor, "batch 3 height width"]:
    """Pixels in [0, 1] minus the mean, over the deviation: what a ViT reads."""
    shift, scale = (_sent(torch.tensor(values, dtype=pixels.dtype).reshape(3, 1, 1), pixels) for values in (mean, std))
    return (pixels - shift) / scale


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator for one step; the pair is hashed, because torch's CPU generator reads 32 bits of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


def _sent(values: Tensor, images: Tensor) -> Tensor:
    """`values` where the images are, without waiting for what is computed there."""
    return values.to(images.device, non_blocking=True)
