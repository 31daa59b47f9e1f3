"""One image that shows the whole method: images, parts, foreground, masks as training goes on, reconstructions."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.figures.samples import pick
from pretrain.config import PretrainConfig, config_of
from pretrain.masking.batch import mask_batch
from pretrain.masking.config import BELONGS, MaskingConfig
from pretrain.pictures import rebuilt, with_holes
from pretrain.train import build, inputs_of
from shards.atomic import write_whole
from shards.shard_set import ShardSet
from training.checkpoint import find, load_tensors
from training.contact_sheet import ROWS, brightness, enlarged, png_of, tinted

COLUMNS = ("image", "parts", "foreground", "mask at 0 %", "at 50 %", "at 100 %", "rebuilt (0 %)", "rebuilt (100 %)")


def draw_sheet(path: Path, *, shards: ShardSet, run: Path, seed: int) -> Path:
    """Write the sheet of a pretraining run to `path` (PNG), on images of `shards` drawn by `seed`."""
    config, batch = _as_semmae(config_of(run)), pick(shards, ROWS, seed=seed)
    model = build(config, shards.size).eval()
    tensors, _ = load_tensors(find(run))
    model.load_state_dict({name: one for name, one in tensors.items() if not name.startswith("masking.")})
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


def _as_semmae(config: PretrainConfig) -> PretrainConfig:
    """The same model, shares and images, masked by parts; settings that belong to other maskings have no say."""
    idle: dict[str, Any] = {
        one.name: one.default for one in fields(MaskingConfig) if "semmae" not in BELONGS.get(one.name, ("semmae",))
    }
    return replace(config, **idle | {"masking": "semmae"})
