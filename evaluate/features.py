"""Frozen features of a split, computed once and kept.

Images are centre squares, resized straight to the encoder's input: DINO's 256-to-224 margin is left out, so
that a shard set, square already, shows what a folder of the same images shows. No flips, no augmentation.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from encoders.frozen import Encoder
from encoders.load import load_encoder
from evaluate.config import FeatureConfig
from evaluate.data import Split, held_out, load_split, same_classes
from shards.atomic import sha256_file, sha256_json
from shards.shard_set import ShardSet
from training.checkpoint import find
from training.device import pick_device
from training.progress import Progress


@dataclass(frozen=True, slots=True)
class TrainAndTest:
    """Features of both splits and what they came from."""

    train: Float[Tensor, "train dim"]
    train_labels: Int64[Tensor, " train"]
    test: Float[Tensor, "test dim"]
    test_labels: Int64[Tensor, " test"]
    classes: int
    checkpoint: str
    checkpoint_sha256: str
    data_fingerprint: str


def train_and_test(config: FeatureConfig) -> TrainAndTest:
    """Load the encoder and the images that `config` names and compute all features, in fp32."""
    train = load_split(config.data, config.images)
    test = load_split(config.val_data, config.val_images) if config.val_data or config.val_images else None
    encoder, checkpoint_sha256 = open_encoder(config, train)

    def features_of(split: Split) -> tuple[Tensor, Tensor]:
        return extract_features(
            encoder,
            split,
            tokens=config.tokens,
            pool=config.pool,
            batch_size=config.batch_size,
            threads=config.threads,
        )

    features, labels = features_of(train)
    classes = len(train.classes) or int(labels.max()) + 1
    if test is None:
        held = held_out(len(labels), config.seed)
        split = features[~held], labels[~held], features[held], labels[held]
        fingerprint = train.fingerprint
    else:
        test_features, test_labels = features_of(test)
        split = features, labels, test_features, same_classes(test_labels, test, train)
        fingerprint = sha256_json([train.fingerprint, test.fingerprint])
    name = config.checkpoint or config.encoder
    if config.encoder_mean and config.encoder_std:
        name += f" mean {config.encoder_mean} std {config.encoder_std}"
    return TrainAndTest(*split, classes, name, checkpoint_sha256, fingerprint)


def open_encoder(config: FeatureConfig, train: Split) -> tuple[Encoder, str]:
    """The encoder and the SHA-256 of its weights: a checkpoint's file, else the tensors as loaded."""
    source = f"run:{find(Path(config.checkpoint))}" if config.checkpoint else config.encoder
    grid = train.images.grid if config.tokens == "kept" and isinstance(train.images, ShardSet) else None
    device = pick_device(config.device)
    encoder = load_encoder(
        source,
        grid=grid if config.size is None else None,
        size=config.size,
        mean=config.encoder_mean,
        std=config.encoder_std,
        device=device,
        precision="fp32",
    )
    if config.checkpoint:
        return encoder, sha256_file(Path(source.removeprefix("run:")))
    return encoder, encoder.fingerprint


def extract_features(
    encoder: Encoder,
    split: Split,
    *,
    tokens: Literal["full", "kept"] = "full",
    pool: Literal["class", "mean"] = "class",
    batch_size: int = 64,
    threads: int = 2,
) -> tuple[Float[Tensor, "images dim"], Int64[Tensor, " images"]]:
    """One feature and one class id for every image of `split` that can be read, on the CPU.

    Raises:
        ValueError: No image could be read, or `tokens` is kept and the ranks are of another grid.
    """
    progress = Progress(len(split), f"features of {split.source}", "images")
    features, labels = [], []
    for batch in split.batches(size=encoder.size, batch_size=batch_size, threads=threads):
        ids = kept_patches(batch.fgrank, encoder.grid, split.source) if tokens == "kept" else None
        found = encoder(torch.from_numpy(batch.images), ids)
        features.append((found.class_token if pool == "class" else found.patch_tokens.mean(dim=1)).cpu())
        labels.append(torch.from_numpy(np.asarray(batch.class_ids, dtype=np.int64)))
        progress.advance(len(batch.images))
    progress.close()
    if split.unreadable:
        left_out, first = len(split.unreadable), split.unreadable[0]
        print(
            f"{left_out} of {len(split)} images in {split.source} could not be read and are left out; "
            f"the first is {first}",
            file=sys.stderr,
        )
    if not features:
        raise ValueError(f"not one of the {len(split)} images in {split.source} could be read; check the files")
    return torch.cat(features).float(), torch.cat(labels)


def kept_patches(
    fgrank: Integer[np.ndarray, "batch rows cols"] | None, grid: int, source: str
) -> Int64[Tensor, "batch kept"]:
    """The quarter of patches best in the foreground rank, in reading order."""
    if fgrank is None or fgrank.shape[1] != grid:
        stored = "no foreground ranks" if fgrank is None else f"ranks of {fgrank.shape[1]} cells a side"
        raise ValueError(
            f"--tokens kept needs foreground ranks of {grid} cells a side, the encoder's grid, but "
            f"{source} holds {stored}; drop --size or use a shard set of that grid"
        )
    order = fgrank.reshape(len(fgrank), -1).astype(np.int64).argsort(axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, : grid * grid // 4], axis=1))
