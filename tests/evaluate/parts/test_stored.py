"""Stored labels against the truth, as `demo` scores and draws them."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import write_samples
from PIL import Image

from evaluate.parts.stored import score_against_truth
from shards.sample import LabelledImage
from shards.shard_set import ShardSet
from training.contact_sheet import BACKGROUND, tinted

GRID, PARTS, COUNT = 4, 3, 3


def stored(tmp_path: Path, *, background: bool, size: tuple[int, int] = (48, 32)) -> ShardSet:
    """Right-hand squares of wide images, with labels that are exactly right; the truth is in tmp_path/true."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "true" / kind).mkdir(parents=True)
    groups, samples = PARTS + background, []
    for number in range(COUNT):
        cells = random.integers(0, PARTS + 1, (GRID, 6)) if background else random.integers(1, PARTS + 1, (GRID, 6))
        truth = Image.fromarray(np.kron(cells, np.ones((8, 8))).astype(np.uint8))
        truth.resize(size, Image.Resampling.NEAREST).save(tmp_path / f"true/labels/{number}.png")
        jpeg = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(jpeg, "JPEG")
        own = cells[:, 2:]
        samples.append(
            LabelledImage(
                key=f"{number:08d}",
                source=f"{number}.jpg",
                class_id=-1,
                jpeg=jpeg.getvalue(),
                parts=((own - 1) % groups).astype(np.uint8),
                fgrank=np.argsort(np.argsort(own == 0, axis=None, kind="stable")).astype(np.uint16).reshape(GRID, GRID),
                src_width=48,
                src_height=32,
                box=(16.0, 0.0, 48.0, 32.0),
            )
        )
    info = {"grid": GRID, "groups": groups, "size": 32, "classes": [], "producer": {"labels": {"parts": PARTS}}}
    return ShardSet.open(write_samples(tmp_path / "set", samples, info, samples_per_shard=2))


@pytest.mark.parametrize("background", [True, False])
def test_labels_that_are_right_score_one_and_no_part_is_taken_for_a_background(background, tmp_path):
    with stored(tmp_path, background=background) as shards:
        row, *controls = score_against_truth({"right": shards}, truth=tmp_path / "true")

        assert shards.num_parts == PARTS
    assert row["foreground_ap"] == row["nmi"] == row["ari"] == pytest.approx(1)
    assert row["parts_used"] > PARTS - 1
    assert [control["method"] for control in controls][:2] == ["bands", "colour"]


def test_truth_of_another_size_is_refused(tmp_path):
    with (
        stored(tmp_path, background=True, size=(24, 16)) as shards,
        pytest.raises(ValueError, match=r"labels/0\.png is 24x16, but its image is 48x32"),
    ):
        score_against_truth({"half": shards}, truth=tmp_path / "true")


def test_a_set_that_does_not_say_how_many_parts_it_has_has_a_background(make_shards):
    assert make_shards(groups=4).num_parts == 3


def test_no_part_is_drawn_as_background_where_there_is_none(tmp_path):
    with stored(tmp_path, background=False) as shards:
        cells = np.tile(np.arange(PARTS), (1, PARTS, 1))
        colours = tinted(np.zeros((1, PARTS, PARTS, 3)), cells, 1 + shards.num_parts)

    assert not np.isclose(colours, 0.65 * BACKGROUND).all(axis=-1).any()
