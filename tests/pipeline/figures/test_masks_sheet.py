"""The sheet of maskings: a column a run, three rows an image, each run's own masks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_set
from PIL import Image
from pyarrow import fs

from pipeline.figures.masks_sheet import IMAGES, draw_masks
from pretrain.config import PretrainConfig, StreamRun
from pretrain.train import pretrain
from training.contact_sheet import CELL, GAP

TINY = {
    "patch": 8, "embed_dim": 16, "depth": 1, "heads": 1, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 1,
    "epochs": 1, "warmup_epochs": 0, "batch_size": 20,
}  # fmt: skip


def run_of(data: Path, masking: str) -> Path:
    out = data.parent / masking
    pretrain(PretrainConfig(data=str(data), masking=masking, run=StreamRun(out=out, device="cpu"), **TINY))
    return out


def test_each_run_shows_its_own_masks_at_three_moments(tmp_path):
    data = write_set(tmp_path / "shards", heads=2)

    sheet = draw_masks(tmp_path / "masks.png", [run_of(data, name) for name in ("random", "semmae", "automae")])

    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    assert pixels.shape[1] == GAP + 5 * (CELL + GAP)
    tiles = [
        [pixels[-(3 * IMAGES - row) * (CELL + GAP) :][:CELL, GAP + col * (CELL + GAP) :][:, :CELL] for row in range(9)]
        for col in range(5)
    ]
    random, semmae, automae = tiles[2:]
    for image in range(IMAGES):
        moments = slice(3 * image, 3 * image + 3)
        assert all((one == random[moments][0]).all() for one in random[moments])
        assert (semmae[moments][0] != semmae[moments][2]).any()
        assert (automae[moments][0] != random[moments][0]).any()


def test_runs_on_other_images_are_refused(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    runs = [
        run_of(write_set(tmp_path / name / "shards", seed=seed), "random") for seed, name in ((0, "one"), (1, "other"))
    ]

    with pytest.raises(ValueError, match="other images than each other"):
        draw_masks(tmp_path / "masks.png", runs)


def test_sets_are_opened_as_their_runs_open_them_and_nothing_else_of_a_run_is_needed(s3, tmp_path):
    """The set lies in a bucket, and what the run measured k-NN on is gone."""
    fs.copy_files(str(write_set(tmp_path / "shards")), "images/set", destination_filesystem=s3)
    run = StreamRun(out=tmp_path / "run", device="cpu", cache=tmp_path / "cache", knn=str(tmp_path / "classes"))
    for name in ("one", "other"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "classes" / name / "0.png")
    pretrain(PretrainConfig(data="s3://images/set", masking="random", run=run, **TINY), stop_after_steps=1)
    shutil.rmtree(tmp_path / "classes")

    assert draw_masks(tmp_path / "masks.png", [run.out]).is_file()
