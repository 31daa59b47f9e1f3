"""Frozen features of a split, computed once and kept.

How images become squares: evaluate/data.py. No flips, no augmentation.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from encoders.frozen import Encoder
from encoders.load import load_encoder
from evaluate.config import FeatureConfig
from evaluate.data import Split, held_out, load_split, same_classes
from pretrain.masking.patches import best_patches
from shards.atomic import sha256_file, sha256_json
from shards.shard_set import ShardSet
from training.checkpoint import find, load_tensors
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
    preparation: str
    """How images became squares: `Split.preparation`."""
    size: int
    """Side of the encoder's input in pixels."""
    keep_share: float | None
    """Share of the patches that the encoder saw; None where it saw all (--tokens full)."""


def train_and_test(config: FeatureConfig) -> TrainAndTest:
    """Load the encoder and the images that `config` names and compute all features, in fp32."""
    train, test = load_split(config.data, config.images, config.labels), None
    if config.val_data or config.val_images:
        test = load_split(config.val_data, config.val_images, config.val_labels)
        train.stored, test.stored = train.stored or test.stored, test.stored or train.stored
    keep_share = share_kept(config, train) if config.tokens == "kept" else None
    encoder, checkpoint_sha256 = open_encoder(config)

    def features_of(split: Split) -> tuple[Tensor, Tensor]:
        return extract_features(
            encoder,
            split,
            keep_share=keep_share,
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
    return TrainAndTest(
        *split,
        classes=classes,
        checkpoint=name,
        checkpoint_sha256=checkpoint_sha256,
        data_fingerprint=fingerprint,
        preparation=train.preparation,
        size=encoder.size,
        keep_share=keep_share,
    )


def open_encoder(config: FeatureConfig) -> tuple[Encoder, str]:
    """The encoder at `--size` or its own, and the SHA-256 of its weights: a checkpoint's file, else the tensors as
    loaded."""
    source = f"run:{find(Path(config.checkpoint))}" if config.checkpoint else config.encoder
    encoder = load_encoder(
        source,
        size=config.size,
        mean=config.encoder_mean,
        std=config.encoder_std,
        device=pick_device(config.device),
        precision="fp32",
    )
    if config.checkpoint:
        return encoder, sha256_file(Path(source.removeprefix("run:")))
    return encoder, encoder.fingerprint


def share_kept(config: FeatureConfig, train: Split) -> float:
    """The share of the patches that is kept: `--keep-share`, else what the checkpoint was pretrained with.

    Raises:
        ValueError: Neither says, or the checkpoint chose its patches by other labels of the same images.
    """
    source = config.checkpoint or config.encoder
    run = config.checkpoint or (source.removeprefix("run:") if source.startswith("run:") else "")
    said: dict[str, Any] = load_tensors(find(Path(run)))[1] if run else {}
    if isinstance(train.images, ShardSet):
        images, identity = train.images.fingerprint, train.images.identity
        trained = said.get("data_fingerprint", "")
        if trained.partition("+")[0] == images and trained != identity:
            raise ValueError(
                f"{source} was pretrained on {train.source} with {_labels_named(trained)}, and kept other patches than "
                f"{_labels_named(identity)} would; name those labels with --labels"
            )
    share = config.keep_share if config.keep_share is not None else said.get("mae", {}).get("keep_share")
    if share is None:
        raise ValueError(
            f"--tokens kept reads the patches that pretraining kept, and {source} does not say how many those were; "
            "give their share as --keep-share (the paper's: 0.25)"
        )
    return share


def _labels_named(identity: str) -> str:
    labels = identity.partition("+")[2]
    return f"the label set {labels[:12]}" if labels else "the labels in its shards"


def extract_features(
    encoder: Encoder,
    split: Split,
    *,
    keep_share: float | None = None,
    pool: Literal["class", "mean"] = "class",
    batch_size: int = 64,
    threads: int = 2,
) -> tuple[Float[Tensor, "images dim"], Int64[Tensor, " images"]]:
    """One feature and one class id for every image of `split` that can be read, on the CPU.

    Args:
        keep_share: Share of the patches, best in foreground, that the encoder sees; None = all.

    Raises:
        ValueError: No image could be read, or there are no ranks that patches could be kept by.
        OSError: The storage does not answer.
    """
    progress = Progress(len(split), f"features of {split.source}", "images")
    features, labels = [], []
    for batch in split.batches(size=encoder.size, batch_size=batch_size, threads=threads):
        ids = None if keep_share is None else kept_patches(batch.fgrank, encoder, keep_share, split.source)
        found = encoder(torch.from_numpy(batch.images), ids)
        features.append((found.class_token if pool == "class" else found.patch_tokens.mean(dim=1)).cpu())
        labels.append(torch.from_numpy(np.asarray(batch.class_ids, dtype=np.int64)))
        progress.advance(len(batch.images))
    progress.close()
    if split.unreadable:
        first, reason = next(iter(split.unreadable.items()))
        print(
            f"{len(split.unreadable)} of {len(split)} images in {split.source} could not be read and are left out; "
            f"the first is {first} ({reason})",
            file=sys.stderr,
        )
    if not features:
        raise ValueError(f"not one of the {len(split)} images in {split.source} could be read; check the files")
    return torch.cat(features).float(), torch.cat(labels)


def kept_patches(
    fgrank: Integer[np.ndarray, "batch rows cols"] | None, encoder: Encoder, share: float, source: str
) -> Int64[Tensor, "batch kept"]:
    """The patches that pretraining would keep: of the encoder's own grid, by the mean rank of the cells of each.

    Raises:
        ValueError: There are no ranks.
    """
    if fgrank is None:
        raise ValueError(f"--tokens kept needs foreground ranks, and {source} holds none; use a shard set")
    return best_patches(torch.from_numpy(fgrank.astype(np.int64)), (encoder.grid, encoder.grid), share)
