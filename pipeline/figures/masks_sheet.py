"""Maskings side by side on the same images, at the start, half-way and at the end of training.

python -m pipeline.figures.masks_sheet masks.png runs/random runs/semmae runs/hpm
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from pipeline.figures.samples import pick
from pretrain.config import config_of
from pretrain.pictures import with_holes
from pretrain.train import Pretraining, inputs_of, opened_shards
from shards.atomic import write_whole
from training.by_itself import by_itself
from training.checkpoint import find, load_tensors
from training.contact_sheet import png_of, tinted

IMAGES = 3
PROGRESS = (0.0, 0.5, 1.0)


def draw_masks(path: Path, runs: list[Path], *, seed: int = 0) -> Path:
    """Write to `path` (PNG) what the encoder sees under the masking of each run: a column a run, and three rows an
    image, for 0, 50 and 100 % of training. Maskings that learn have the weights of their run's newest checkpoint.

    Raises:
        ValueError: The runs are on other images than each other.
    """
    names, columns, fingerprints = ["image", "parts"], [], set()
    for run in runs:
        config = config_of(run)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, knn=None))
        with opened_shards(config) as shards:
            fingerprints.add(shards.fingerprint)
            batch = pick(shards, IMAGES, seed=seed)
            images = np.repeat(batch.images.astype(np.float32), len(PROGRESS), axis=0)
            if not columns:
                columns = [images, tinted(images, np.repeat(batch.parts, len(PROGRESS), axis=0), 1 + shards.num_parts)]
            task = Pretraining(config, shards)
            task.objective.load_tensors(load_tensors(find(run))[0])
            inputs = inputs_of(batch, config, shards, task.device)
            seen = [task.objective.masked(inputs, progress).ids_visible.cpu() for progress in PROGRESS]
            columns.append(with_holes(images, torch.stack(seen, dim=1).flatten(0, 1), config.patch))
            names.append(config.masking)
    if len(fingerprints) > 1:
        raise ValueError("the runs are on other images than each other; draw those of one shard set")
    write_whole(path, png_of(names, columns))
    return path


def _show(out: Path, first: Path, *others: Path) -> None:
    print(draw_masks(out, [first, *others]))


if __name__ == "__main__":
    by_itself(_show, __doc__)
