"""One image that shows the whole method: images, parts, foreground, masks as training goes on, reconstructions."""

from pathlib import Path

import numpy as np
import torch

from pretrain.config import PretrainConfig, StreamRun
from pretrain.masking.batch import Masked, mask_batch
from pretrain.train import build, inputs_of
from shards.atomic import read_json, write_whole
from shards.batches import STORED, Batch, Reader
from shards.order import permutation
from shards.shard_set import ShardSet
from training.augment import IMAGENET_MEAN, IMAGENET_STD
from training.checkpoint import find, load_tensors
from training.contact_sheet import ROWS, brightness, enlarged, png_of, tinted

HIDDEN = 235
COLUMNS = ("image", "parts", "foreground", "mask at 0 %", "at 50 %", "at 100 %", "rebuilt (0 %)", "rebuilt (100 %)")


def draw_sheet(path: Path, *, shards: ShardSet, run: Path, seed: int) -> Path:
    """Write the sheet of a pretraining run to `path` (PNG), on images of `shards` drawn by `seed`."""
    config, batch = _config(run), _pick(shards, seed)
    model = build(config, shards.size).eval()
    model.load_state_dict(load_tensors(find(run))[0])
    masks = [mask_batch(inputs_of(batch, config, shards), progress) for progress in (0.0, 0.5, 1.0)]
    images = batch.images.astype(np.float32)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std

    def rebuilt(masked: Masked) -> np.ndarray:
        image = model.reconstruct(pixels, masked.ids_visible, masked.ids_masked) * std + mean
        return (image.permute(0, 2, 3, 1).numpy() * 255).clip(0, 255)

    columns = [
        images,
        tinted(images, batch.parts, 1 + shards.num_parts),
        images * enlarged(brightness(batch.fgrank), shards.size),
        *(_with_holes(images, masked, model.rows) for masked in masks),
        rebuilt(masks[0]),
        rebuilt(masks[2]),
    ]
    write_whole(path, png_of(COLUMNS, columns))
    return path


def _config(run: Path) -> PretrainConfig:
    """The run's config with semantic masking, for drawing."""
    values = {name: value for name, value in read_json(run / "config.json").items() if name not in ("run", "verb")}
    return PretrainConfig(**values | {"masking": "semmae"}, run=StreamRun(out=run))


def _pick(shards: ShardSet, seed: int) -> Batch:
    """The first ROWS samples of the seed's order."""
    wanted = np.sort(permutation(len(shards), seed=seed, epoch=0)[:ROWS])
    place = (wanted, np.zeros_like(wanted), 0)
    (batch,) = Reader(shards, STORED, attention=False, substitutes=0).decoded([place], threads=1, prefetch=0)
    return batch


def _with_holes(images: np.ndarray, masked: Masked, side: int) -> np.ndarray:
    """What the encoder sees: masked patches, and those that take no part, are blank."""
    seen = torch.zeros(len(images), side * side).scatter_(1, masked.ids_visible, 1.0).reshape(-1, side, side, 1)
    window = enlarged(seen.numpy(), images.shape[1])
    return images * window + HIDDEN * (1 - window)
