"""What the encoder sees of a few fixed images, and what the decoder makes of it."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from pretrain.mae import MAE
from pretrain.masking.batch import Masked
from shards.atomic import write_whole
from training.augment import IMAGENET_MEAN, IMAGENET_STD, normalised
from training.contact_sheet import enlarged, png_of

BLANK = 235
"""Grey value of what the encoder does not see."""
COLUMNS = ("image", "seen", "rebuilt")


def draw_pictures(path: Path, model: MAE, masked: Masked) -> None:
    """Write a sheet of these images to `path` (PNG): each, what the encoder sees of it, and its reconstruction."""
    images = masked.images.numpy().astype(np.float32)
    columns = [images, with_holes(images, masked.ids_visible.cpu(), model.patch), rebuilt(model, masked)]
    path.parent.mkdir(exist_ok=True)
    write_whole(path, png_of(COLUMNS, columns))


def with_holes(
    images: Float32[np.ndarray, "batch height width 3"], ids_visible: Int64[Tensor, "batch visible"], patch: int
) -> Float32[np.ndarray, "batch height width 3"]:
    """What the encoder sees: masked patches, and those that take no part, are blank."""
    side = images.shape[1] // patch
    seen = torch.zeros(len(images), side * side).scatter_(1, ids_visible, 1.0).reshape(-1, side, side, 1)
    window = enlarged(seen.numpy(), images.shape[1])
    return images * window + BLANK * (1 - window)


def rebuilt(model: MAE, masked: Masked) -> Float32[np.ndarray, "batch height width 3"]:
    """The images with their masked patches as the decoder predicts them, in fp32; see `MAE.reconstruct`."""
    masked = masked.to(model.mask_token.device)
    made = model.reconstruct(_pixels(masked.images), masked.ids_visible, masked.ids_predicted)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((made.cpu() * std + mean).permute(0, 2, 3, 1).numpy() * 255).clip(0, 255)


def _pixels(images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    return normalised(images.permute(0, 3, 1, 2).float() / 255)
