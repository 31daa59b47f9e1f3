"""One image that shows the whole method: images, parts, foreground, masks as training goes on, reconstructions."""

import dataclasses
from pathlib import Path

import numpy as np

from pretrain.config import config_of
from pretrain.masking.batch import mask_batch
from pretrain.pictures import rebuilt, with_holes
from pretrain.train import build, inputs_of
from shards.atomic import write_whole
from shards.batches import STORED, Batch, Reader
from shards.order import permutation
from shards.shard_set import ShardSet
from training.checkpoint import find, load_tensors
from training.contact_sheet import ROWS, brightness, enlarged, png_of, tinted

COLUMNS = ("image", "parts", "foreground", "mask at 0 %", "at 50 %", "at 100 %", "rebuilt (0 %)", "rebuilt (100 %)")


def draw_sheet(path: Path, *, shards: ShardSet, run: Path, seed: int) -> Path:
    """Write the sheet of a pretraining run to `path` (PNG), on images of `shards` drawn by `seed`."""
    config, batch = dataclasses.replace(config_of(run), masking="semmae"), _pick(shards, seed)
    model = build(config, shards.size).eval()
    model.load_state_dict(load_tensors(find(run))[0])
    masks = [mask_batch(inputs_of(batch, config, shards), progress) for progress in (0.0, 0.5, 1.0)]
    images = batch.images.astype(np.float32)
    columns = [
        images,
        tinted(images, batch.parts, 1 + shards.num_parts),
        images * enlarged(brightness(batch.fgrank), shards.size),
        *(with_holes(images, masked.ids_visible, model.patch) for masked in masks),
        rebuilt(model, masks[0]),
        rebuilt(model, masks[2]),
    ]
    write_whole(path, png_of(COLUMNS, columns))
    return path


def _pick(shards: ShardSet, seed: int) -> Batch:
    """The first ROWS samples of the seed's order."""
    wanted = np.sort(permutation(len(shards), seed=seed, epoch=0)[:ROWS])
    place = (wanted, np.zeros_like(wanted), 0)
    (batch,) = Reader(shards, STORED, attention=False, substitutes=0).decoded([place], threads=1, prefetch=0)
    return batch
