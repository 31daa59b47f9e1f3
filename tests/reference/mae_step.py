"""A pretraining as MAE and SemMAE write it: an image, a head and a weight at a time, in float64.

MAE: arXiv:2111.06377, section 3 and tables 8 and 9. SemMAE: arXiv:2206.10207, Algorithm 1.
"""

import io
import math
from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from reference.algorithm1 import counts, mask_of
from reference.vit import block, linear, norm, patches_of
from torch import Tensor

from shards.crops import sample_boxes
from shards.order import permutation
from shards.rng import FLIP, MASK, PART_ORDER, uniform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def taken(count: int, step: int, config) -> list[tuple[int, int]]:
    """Epoch and index of every image of a step: epoch after epoch, each in its own order."""
    places = range(step * config.batch_size, (step + 1) * config.batch_size)
    orders = {epoch: permutation(count, seed=config.seed, epoch=epoch) for epoch in {at // count for at in places}}
    return [(at // count, int(orders[at // count][at % count])) for at in places]


def shown(sample, config, groups: int, *, epoch: int, progress: Fraction) -> tuple[Tensor, list[int], list[int]]:
    """What the model gets of one image: normalised pixels, visible and masked patches. A patch is a cell here."""
    key = config.seed, np.array([epoch]), np.array([sample.index])
    grid = len(sample.parts)
    size = grid * config.patch
    box = (0, 0, size, size)
    if config.crop_scale < 1:
        box = tuple(sample_boxes(*key, size=size, scale=config.crop_scale)[0].tolist())
    flip = config.flip and bool(uniform(*key, FLIP, 1)[0, 0] < 0.5)
    parts, ranks = (_cut_cells(cells, size, box) for cells in (sample.parts, sample.fgrank))
    cells = [row[::-1] if flip else row for row in np.arange(grid * grid).reshape(grid, grid).tolist()]
    cell_of_patch = [cell for row in cells for cell in row]  # before mirroring
    best = sorted(range(grid * grid), key=lambda cell: (ranks[cell], cell))[: round(config.keep_share * grid * grid)]
    kept = [patch for patch, cell in enumerate(cell_of_patch) if cell in best]
    labels = [parts[cell_of_patch[patch]] for patch in kept]
    mask = _mask(labels, config, groups, key, progress)
    visible = [patch for patch, hidden in zip(kept, mask, strict=True) if not hidden]
    masked = [patch for patch, hidden in zip(kept, mask, strict=True) if hidden]
    return _pixels(sample.jpeg, size, box, flip), visible, masked


def _mask(labels: list[int], config, groups: int, key, progress: Fraction) -> list[bool]:
    masked = len(labels) - int(len(labels) * (1 - config.mask_ratio))
    noise = uniform(*key, MASK, len(labels))[0].tolist()
    if config.masking == "random":
        least = sorted(range(len(labels)), key=lambda place: noise[place])[:masked]
        return [place in least for place in range(len(labels))]
    turn = uniform(*key, PART_ORDER, groups)[0].tolist()
    sizes = [labels.count(part) for part in range(groups)]
    order = sorted(range(groups), key=lambda part: turn[part])
    return mask_of(labels, noise, counts(sizes, order, masked, progress ** int(config.gamma)))


def _pixels(jpeg: bytes, size: int, box: tuple[int, ...], flip: bool) -> Tensor:
    """The stored image, cut, put back to its size by Pillow's bicubic, mirrored, and as a ViT reads it."""
    image = Image.open(io.BytesIO(jpeg))
    x, y, width, height = box
    if box != (0, 0, size, size):
        image = image.crop((x, y, x + width, y + height)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.float64))
    pixels = torch.stack([(pixels[..., channel] / 255 - MEAN[channel]) / STD[channel] for channel in range(3)])
    return pixels.flip(-1) if flip else pixels


def _cut_cells(cells: np.ndarray, size: int, box: tuple[int, ...]) -> list[int]:
    grid, (x, y, width, height) = len(cells), box
    centres = [(place + 0.5) / grid for place in range(grid)]
    return [
        int(cells[int((y + v * height) / size * grid), int((x + u * width) / size * grid)])
        for v in centres
        for u in centres
    ]


def loss(weights: dict[str, Tensor], config, images: list[tuple[Tensor, list[int], list[int]]]) -> Tensor:
    """Mean squared error over the pixels of the masked patches of all images."""
    return torch.cat([losses(weights, config, *image) for image in images]).mean()


def losses(weights: dict[str, Tensor], config, pixels: Tensor, visible: list[int], masked: list[int]) -> Tensor:
    """Mean squared error of each masked patch of an image."""
    patches, errors = patches_of(pixels, config.patch), []
    x = tokens(weights, config, pixels, visible, masked)
    for number in range(config.decoder_depth):
        x = block(weights, f"decoder_blocks.{number}", x, config.decoder_heads)
    guesses = linear(weights, "decoder_pixels", norm(weights, "decoder_norm", x))[1 + len(visible) :]
    for guess, patch in zip(guesses, masked, strict=True):
        target = patches[patch]
        if config.norm_pix_loss:
            target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
        errors.append(((guess - target) ** 2).mean())
    return torch.stack(errors)


def tokens(weights: dict[str, Tensor], config, pixels: Tensor, visible: list[int], masked: list[int]) -> Tensor:
    """What a decoder reads of an image: the class, the visible patches, mask tokens."""
    patches = patches_of(pixels, config.patch)
    grid = tuple(side // config.patch for side in pixels.shape[-2:])
    where, where_decoded = _positions(config.embed_dim, *grid), _positions(config.decoder_dim, *grid)
    kernel = weights["encoder.patch_embed.proj.weight"].flatten(1)
    encoded = [weights["encoder.cls_token"][0, 0]]
    encoded += [kernel @ patches[p] + weights["encoder.patch_embed.proj.bias"] + where[p] for p in visible]
    x = torch.stack(encoded)
    for number in range(config.depth):
        x = block(weights, f"encoder.blocks.{number}", x, config.heads)
    x = linear(weights, "decoder_embed", norm(weights, "encoder.norm", x))
    seen = [x[1 + place] + where_decoded[p] for place, p in enumerate(visible)]
    hidden = [weights["mask_token"][0, 0] + where_decoded[p] for p in masked]
    return torch.stack([x[0], *seen, *hidden])


def _positions(dim: int, rows: int, cols: int) -> Tensor:
    rates = [10_000 ** (-k / (dim / 4)) for k in range(dim // 4)]
    axis = [[f(place * rate) for f in (math.sin, math.cos) for rate in rates] for place in range(max(rows, cols))]
    return torch.tensor([axis[col] + axis[row] for row in range(rows) for col in range(cols)], dtype=torch.float64)
