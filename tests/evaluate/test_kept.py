"""`--tokens kept` reads the patches that pretraining kept: same grid, same share, same labels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawn, write_samples
from torch import Tensor

from encoders.load import load_encoder
from evaluate.config import KnnConfig
from evaluate.features import TrainAndTest, kept_patches, train_and_test
from pretrain.config import PretrainConfig, StreamRun
from pretrain.mae import MAE, gather, patchify
from pretrain.masking.batch import mask_batch
from pretrain.masking.inputs import Inputs
from pretrain.train import build, inputs_of, pretrain
from shards.batches import in_order
from shards.shard_set import ShardSet
from training.augment import IMAGENET_MEAN, IMAGENET_STD
from training.checkpoint import find, load_tensors

MODEL = {"patch": 8, "embed_dim": 32, "depth": 2, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
SIZE, PATCHES, CELLS = 32, 4, 8
"""Pixels, patches and label cells a side: each patch covers four cells, as a patch of 16 does at 224 px."""


@pytest.fixture
def shards(make_shards) -> ShardSet:
    return make_shards(count=12, size=SIZE, grid=CELLS)


@pytest.fixture
def run_of(shards, tmp_path) -> Callable[..., PretrainConfig]:
    """A function that pretrains on `shards`, for no step unless told."""

    def run(**settings) -> PretrainConfig:
        common = {"data": str(shards.path), "masking": "random", "epochs": 0, "warmup_epochs": 0, "batch_size": 4}
        where = StreamRun(out=tmp_path / "run", device="cpu", precision="fp32")
        config = PretrainConfig(**MODEL | common | settings, run=where)
        pretrain(config)
        return config

    return run


def found(source: str, shards: ShardSet, **settings) -> TrainAndTest:
    """Features of all images of a set, as its own test split."""
    data = {"data": str(shards.path), "val_data": str(shards.path)}
    where = {"encoder" if ":" in source else "checkpoint": source}
    return train_and_test(KnnConfig(device="cpu", **{"tokens": "kept", "pool": "mean"} | where | data | settings))


def kept_by_pretraining(config: PretrainConfig, shards: ShardSet) -> tuple[Tensor, Tensor]:
    """Images as the objective normalises them, and the patches that it sees or asks for: all that take part."""
    (batch,) = in_order(shards, batch_size=len(shards))
    masked = mask_batch(inputs_of(batch, config, shards), 0.3)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (torch.from_numpy(batch.images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return pixels, torch.cat([masked.ids_visible, masked.ids_masked], dim=1).sort(dim=1).values


def slowly_kept(fgrank: np.ndarray, share: float) -> list[int]:
    """One image's patches by loops: the mean rank of a patch's cells, the best `share`, in reading order."""
    block = CELLS // PATCHES
    means = []
    for row in range(PATCHES):
        for col in range(PATCHES):
            cells = [fgrank[row * block + y][col * block + x] for y in range(block) for x in range(block)]
            means.append(sum(map(int, cells)) / len(cells))
    best = sorted(range(PATCHES**2), key=lambda patch: (means[patch], patch))
    return sorted(best[: round(share * PATCHES**2)])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_features_are_those_of_the_patches_that_the_objective_keeps(share, shards, run_of):
    config = run_of(keep_share=share, epochs=1)
    model: MAE = build(config, SIZE).eval()
    model.load_state_dict(load_tensors(find(config.run.out))[0])
    pixels, kept = kept_by_pretraining(config, shards)
    (batch,) = in_order(shards, batch_size=len(shards))

    features = found(str(config.run.out), shards)

    assert kept.tolist() == [slowly_kept(fgrank, share) for fgrank in batch.fgrank]
    with torch.no_grad():
        tokens = model.encode(gather(patchify(pixels, model.patch), kept), kept)
    assert torch.allclose(features.test, tokens[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)
    assert (features.size, features.keep_share) == (SIZE, share)
    on_class = found(f"run:{config.run.out}", shards, pool="class")
    assert torch.allclose(on_class.test, tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_a_share_that_is_asked_for_takes_the_place_of_the_runs(shards, run_of):
    run = str(run_of(keep_share=0.25).run.out)

    half = found(run, shards, keep_share=0.5)

    assert half.keep_share == 0.5
    assert not torch.allclose(half.test, found(run, shards).test)
    assert torch.allclose(found(run, shards, keep_share=1.0).test, found(run, shards, tokens="full").test, atol=1e-6)


def test_an_encoder_that_was_not_pretrained_here_needs_the_share(shards):
    source = "random:vit_tiny_patch16_224"

    with pytest.raises(
        ValueError, match=r"random:vit_tiny.* does not say how many .* give their share as --keep-share"
    ):
        found(source, shards, size=SIZE)

    assert found(source, shards, size=SIZE, keep_share=0.25).keep_share == 0.25


def test_cells_that_patches_cut_are_shared_by_area(make_shards, run_of):
    run, six = run_of(keep_share=0.25), make_shards("six", count=6, size=SIZE, grid=6)
    (batch,) = in_order(six, batch_size=6)

    kept = kept_patches(batch.fgrank, load_encoder(f"run:{run.run.out}", device=torch.device("cpu")), 0.25, "six")

    assert torch.equal(kept, Inputs(batch, run, 0, (PATCHES, PATCHES), six.groups).kept)
    assert kept.shape == (6, 4)


def other_labels(shards: ShardSet, folder: Path) -> ShardSet:
    """A label set over `shards`: the same images with other labels and ranks."""
    info = {"grid": CELLS, "groups": 4, "size": SIZE, "classes": list(shards.classes), "labels_of": shards.fingerprint}
    samples = [replace(one, jpeg=b"") for one in drawn(len(shards), SIZE, CELLS, 4, len(shards.classes), seed=9)]
    return ShardSet.open(write_samples(folder, samples, info, samples_per_shard=16))


def test_patches_are_kept_by_the_labels_that_the_run_was_pretrained_with(shards, run_of, tmp_path):
    labels = other_labels(shards, tmp_path / "labels")
    config = run_of(keep_share=0.25, labels=str(labels.path))
    run = str(config.run.out)

    with pytest.raises(ValueError, match=r"with the label set \w{12}, and kept other patches than the labels in its"):
        found(run, shards)
    laid_over = found(run, shards, labels=str(labels.path), val_labels=str(labels.path))

    model = build(config, SIZE).eval()
    with ShardSet.open(shards.path, labels=labels.path) as both:
        pixels, kept = kept_by_pretraining(config, both)
    with torch.no_grad():
        tokens = model.encode(gather(patchify(pixels, model.patch), kept), kept)
    assert torch.allclose(laid_over.train, tokens[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)
    assert torch.equal(laid_over.train, laid_over.test)
