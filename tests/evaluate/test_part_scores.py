"""`score-parts`: crops of picture and truth belong together, and the verb's rows are those that scripts rely on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluate.part_quality import beyond_other
from evaluate.part_scores import shift_ari
from evaluate.truth import TruthSet
from pipeline.config import ScorePartsConfig
from pipeline.score_parts import score_parts

GRID = 8
ROW = {"set", "method", "parts", "seed", "view", "foreground_ap", "foreground_recall_quarter", "beyond_shortcut"}
ROW |= {"beyond_other", "nmi", "ari", "nmi_image", "ari_image", "colour_nmi", "bands_nmi", "shift_ari", "parts_used"}
ROW |= {"largest_share", "speckle", "flip_agreement"}


@pytest.fixture
def painted(tmp_path) -> Path:
    """Pictures painted from their truth: part k is grey 40 k. Blocks of 10 pixels, 160 x 120 and 120 x 160."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for number, shape in enumerate([(12, 16), (16, 12), (12, 16), (12, 12)]):
        labels = np.kron(random.integers(0, 5, shape), np.ones((10, 10))).astype(np.uint8)
        Image.fromarray(40 * labels).save(tmp_path / f"set/images/{number}.png")
        Image.fromarray(labels).save(tmp_path / f"set/labels/{number}.png")
    return tmp_path / "set"


def agreement(images: np.ndarray, truth: np.ndarray) -> float:
    """Share of cells whose middle pixel has the grey of the true part."""
    step = images.shape[1] // GRID
    middles = images[:, step // 2 :: step, step // 2 :: step, 0].astype(int)
    return float((np.abs(middles - 40 * truth) < 15).mean())


def test_every_view_shows_the_cells_that_its_truth_tells_of(painted):
    truths = TruthSet(painted)
    views = [truths.centre(size=120, grid=GRID), truths.off_centre(size=120, grid=GRID)]
    views += truths.shifted(size=96, grid=GRID)

    for view in views:
        assert agreement(view.images, view.truth) > 0.75
    assert not np.array_equal(views[0].truth[0], views[1].truth[0])
    assert np.array_equal(views[0].truth[3], views[1].truth[3])


def test_labels_that_follow_the_picture_pass_the_shift_test_and_stripes_of_columns_do_not(painted):
    left, right = TruthSet(painted).shifted(size=96, grid=GRID)
    columns = np.broadcast_to(np.arange(GRID) // 3, left.truth.shape)

    assert shift_ari(left.truth, right.truth) > 0.8
    assert shift_ari(columns, columns) < 0.75


def test_masks_are_truth_of_one_part(painted):
    (painted / "masks").mkdir()
    for label in (painted / "labels").iterdir():
        with Image.open(label) as parts:
            mask = np.where(np.asarray(parts) > 2, 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(painted / "masks" / label.name)
        label.unlink()
    (painted / "labels").rmdir()

    assert set(np.unique(TruthSet(painted).centre(size=120, grid=GRID).truth)) == {0, 1}


def test_a_picture_without_truth_is_named(painted):
    (painted / "labels/2.png").unlink()

    with pytest.raises(FileNotFoundError, match=r"2\.png is missing"):
        TruthSet(painted)


def test_beyond_other_knows_parts_from_what_all_pictures_share():
    """By hand: one stratum, truth drawn anew in each picture; the truth itself scores 1, one map for all scores 0."""
    truth = np.random.default_rng(0).integers(1, 3, (40, 6, 6))
    strata = np.zeros_like(truth)
    shared = np.broadcast_to(truth[0], truth.shape)

    assert beyond_other(truth, truth, strata) == pytest.approx(1, abs=0.01)
    assert beyond_other(shared, truth, strata) == 0
    assert beyond_other(truth, np.ones_like(truth), strata) is None


def test_the_verb_scores_baselines_and_shortcuts_in_one_table(painted, tmp_path, capsys):
    config = ScorePartsConfig(
        images=(str(painted),),
        parts=("heads", "grid"),
        encoder="random:vit_tiny_patch16_224",
        grid=GRID,
        size=64,
        json=tmp_path / "rows.json",
        sheet=tmp_path / "sheet.png",
        device="cpu",
        precision="fp32",
    )

    rows = score_parts(config)

    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert all(set(row) == ROW for row in rows)
    assert [row["method"].partition(" on ")[0] for row in rows[:4]] == ["heads", "heads", "grid", "grid"]
    assert {row["method"] for row in rows[4:]} == {"bands", "colour", "centre", "darkness", "border_rgb"}
    assert {row["view"] for row in rows} == {"centre", "off centre"}
    assert rows[4]["bands_nmi"] is not None
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 112
    assert "heads on vit_tiny_patch16_224 block 11" in capsys.readouterr().out
