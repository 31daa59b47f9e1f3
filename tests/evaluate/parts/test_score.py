"""`score-parts`: crops of image and truth belong together, and the verb's rows are those that scripts rely on."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_parts
from PIL import Image

from evaluate.parts.metrics import beyond_other, flip_agreement, flip_inside
from evaluate.parts.score import BATCH, below_centre, labels_of, score_labellers, shift_ari
from evaluate.parts.views import TruthSet
from partlearn.config import LearnConfig
from partlearn.labelling.baselines import NAMES
from partlearn.labelling.learned import open_token_labeller
from partlearn.train import learn
from pipeline.config import ScorePartsConfig
from pipeline.score_parts import READ_BLOCK, SHOWN, _figure, _print, score_parts, short_names
from training.config import RunConfig

GRID = 8
ROW = {"set", "method", "parts", "seed", "view", "foreground_ap", "foreground_recall_quarter", "beyond_shortcut"}
ROW |= {"beyond_other", "nmi", "ari", "nmi_image", "ari_image", "colour_nmi", "bands_nmi", "shift_ari", "parts_used"}
ROW |= {"largest_share", "speckle", "flip_agreement", "foreground_iou_best", "foreground_iou_quarter", "stability"}
ROW |= {"areas", "speckle_inside", "flip_inside", "images"}


@pytest.fixture
def painted(tmp_path) -> Path:
    """Images painted from their truth: part k is grey 40 k. Blocks of 10 pixels, 160 x 120 and 120 x 160."""
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
    views = [truths.centre(size=120, grid=GRID), truths.ends(size=120, grid=GRID)]
    views += truths.shifted(size=96, grid=GRID)

    for view in views:
        assert agreement(view.images, view.truth) > 0.75
    assert not np.array_equal(views[0].truth[0], views[1].truth[0])
    assert np.array_equal(views[0].truth[3], views[1].truth[3])
    assert views[1].off_centre.tolist() == [True, True, True, False]
    assert not views[0].off_centre.any()
    first = truths.first(2, size=120, grid=GRID)
    assert np.array_equal(first.images, views[0].images[:2])
    assert np.array_equal(first.truth, views[0].truth[:2])


def test_labels_that_follow_the_image_pass_the_shift_test_and_stripes_of_columns_do_not(painted):
    left, right = TruthSet(painted).shifted(size=96, grid=GRID)
    columns = np.broadcast_to(np.arange(GRID) // 3, left.truth.shape)

    assert shift_ari(left.truth, right.truth) > 0.8
    assert shift_ari(columns, columns) < 0.75


@pytest.fixture
def striped(tmp_path) -> Path:
    """A wide, a high and a square image, with upright stripes of 23 pixels for their true parts."""
    for kind in ("images", "labels"):
        (tmp_path / "striped" / kind).mkdir(parents=True)
    for number, (width, height) in enumerate([(401, 300), (300, 401), (333, 333)]):
        labels = np.broadcast_to(np.arange(width) // 23 % 7, (height, width)).astype(np.uint8)
        Image.fromarray(labels).save(tmp_path / f"striped/images/{number}.png")
        Image.fromarray(labels).save(tmp_path / f"striped/labels/{number}.png")
    return tmp_path / "striped"


@pytest.mark.parametrize("grid", [8, 14, 37, 10, 28])
def test_cells_of_both_crops_of_the_shift_test_coincide_on_every_grid(grid, striped):
    left, right = TruthSet(striped).shifted(size=96, grid=grid)

    assert shift_ari(left.truth, right.truth) == 1


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_grids_of_few_cells_have_a_shift_test_too(grid, striped):
    left, right = TruthSet(striped).shifted(size=96, grid=grid)

    assert left.truth.shape == right.truth.shape == (3, grid, grid)
    assert shift_ari(left.truth, right.truth) == 1


def test_an_image_of_fewer_pixels_than_cells_is_named(painted):
    with pytest.raises(
        ValueError, match=r"0\.png is 160x120: too small for crops of 100 cells a side; choose a smaller"
    ):
        TruthSet(painted).shifted(size=96, grid=100)


def test_truth_of_another_size_or_orientation_than_its_image_is_refused(painted):
    with Image.open(painted / "images/1.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # shown after a quarter turn
        image.save(painted / "images/1.png", exif=exif)
    with pytest.raises(ValueError, match=r"labels/1\.png is 120x160, but its image is 160x120 as shown"):
        TruthSet(painted).centre(size=120, grid=GRID)

    with Image.open(painted / "labels/0.png") as labels:
        half = labels.resize((80, 60), Image.Resampling.NEAREST)
    half.save(painted / "labels/0.png")
    with pytest.raises(ValueError, match=r"labels/0\.png is 80x60, but its image is 160x120 .*; give the map the"):
        TruthSet(painted).shifted(size=120, grid=GRID)


def test_masks_are_truth_of_one_part(painted):
    (painted / "masks").mkdir()
    for label in (painted / "labels").iterdir():
        with Image.open(label) as parts:
            mask = np.where(np.asarray(parts) > 2, 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(painted / "masks" / label.name)
        label.unlink()
    (painted / "labels").rmdir()

    assert set(np.unique(TruthSet(painted).centre(size=120, grid=GRID).truth)) == {0, 1}


def test_an_image_without_truth_is_named(painted):
    (painted / "labels/2.png").unlink()

    with pytest.raises(FileNotFoundError, match=r"2\.png is missing"):
        TruthSet(painted)


def test_truth_without_a_part_is_a_sentence(painted):
    for file in (painted / "labels").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(file)))).save(file)

    with pytest.raises(ValueError, match="no centre square of"):
        TruthSet(painted).centre(size=120, grid=GRID)


def test_beyond_other_knows_parts_from_what_all_images_share():
    """By hand: one stratum, truth drawn again in each image; the truth itself scores 1, one map for all scores 0."""
    truth = np.random.default_rng(0).integers(1, 3, (40, 6, 6))
    strata = np.zeros_like(truth)
    shared = np.broadcast_to(truth[0], truth.shape)

    assert beyond_other(truth, truth, strata) == pytest.approx(1, abs=0.01)
    assert beyond_other(shared, truth, strata) == 0
    assert beyond_other(truth, np.ones_like(truth), strata) is None


TINY = "random:vit_tiny_patch16_224"


def scored(painted: Path, **settings: Any) -> list[dict[str, Any]]:
    """Rows of the verb on the painted images."""
    common: dict[str, Any] = {"encoder": (TINY,), "grid": GRID, "size": 64, "device": "cpu", "precision": "fp32"}
    return score_parts(ScorePartsConfig(images=(str(painted),), **common | settings))


def test_the_verb_scores_baselines_and_shortcuts_in_one_table(painted, tmp_path, capsys):
    rows = scored(painted, parts=("heads", "grid"), json=tmp_path / "rows.json", sheet=tmp_path / "drawn" / "sheet.png")

    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert all(set(row) == ROW for row in rows)
    assert [row["method"].partition(" on ")[0] for row in rows[:4]] == ["heads", "heads", "grid", "grid"]
    assert {row["method"] for row in rows[4:]} == {"bands", "colour", "centre", "darkness", "border_rgb"}
    assert {row["view"] for row in rows} == {"centre", "off centre"}
    assert rows[4]["bands_nmi"] is not None
    assert [len(row["areas"]) for row in rows[:4]] == [3, 3, 6, 6]
    assert all(sum(row["areas"]) == pytest.approx(1) for row in rows[:4])
    assert rows[4]["areas"] is rows[0]["stability"] is None
    with Image.open(tmp_path / "drawn/sheet.png") as sheet:
        assert sheet.width > 4 * 112
    assert "heads on random:vit_tiny_patch16_224 parts 3" in capsys.readouterr().out


def test_baselines_stand_on_every_encoder_and_where_it_matters_to_them_on_every_block_and_count(painted, tmp_path):
    encoders = (TINY, "random:deit_tiny_patch16_224")
    rows = scored(
        painted,
        parts=("heads", "grid", "kmeans-image"),
        encoder=encoders,
        encoder_block=(3, 11),
        num_parts=(4, 6),
        sheet=tmp_path / "sheet.png",
    )

    names = ("heads on {} parts 3", "grid on {} parts 4", "grid on {} parts 6")
    names += tuple(f"kmeans-image on {{}} block {block} parts {parts}" for block in (3, 11) for parts in (4, 6))
    assert [row["method"] for row in rows[:28:2]] == [name.format(encoder) for encoder in encoders for name in names]
    assert [(row["parts"], row["view"]) for row in rows[28:] if row["method"] == "bands parts 6"] == [
        (6, "centre"),
        (6, "off centre"),
    ]
    assert len(rows) == 28 + 2 * 6
    drawn = {path.name for path in tmp_path.glob("sheet*.png")}
    assert len(drawn) == 14
    assert "sheet-grid-on-random-deit_tiny_patch16_224-parts-6.png" in drawn
    assert "sheet-kmeans-image-on-random-deit_tiny_patch16_224-block-3-parts-6.png" in drawn


def resized(folder: Path, shape: tuple[int, int], *names: str) -> None:
    """Images and truth of a folder, or of its files with these names, at another width and height."""
    for path in folder.rglob("*.png"):
        if not names or path.stem in names:
            with Image.open(path) as image:
                image.resize(shape, Image.Resampling.NEAREST).save(path)


def test_a_square_image_is_scored_once_and_the_table_says_so(painted, tmp_path, capsys):
    rows = scored(painted, parts=("grid", "heads"))
    told = " ".join(capsys.readouterr().out.split())
    shutil.copytree(painted, tmp_path / "without")
    for kind in ("images", "labels"):
        (tmp_path / "without" / kind / "3.png").unlink()

    without = scored(tmp_path / "without", parts=("grid", "heads"))

    assert {(row["view"], row["images"]) for row in rows} == {("centre", 4), ("off centre", 3)}
    assert f"{painted}, centre, 4 images (1 of them square)" in told
    assert f"{painted}, off centre, 3 images (1 square ones have no such view)" in told
    of_all = ("set", "shift_ari", "flip_agreement", "flip_inside")
    for row, alone in zip(rows, without, strict=True):
        if row["view"] == "off centre":
            assert {k: v for k, v in row.items() if k not in of_all} == {k: alone[k] for k in row if k not in of_all}


@pytest.mark.parametrize("shape", [(120, 120), (120, 129), (130, 120)])
def test_where_no_image_has_a_square_a_cell_off_the_centre_there_is_one_view(shape, painted, capsys):
    resized(painted, shape)

    rows = scored(painted, parts=("grid", "shuffled-heads"))

    assert {(row["view"], row["images"]) for row in rows} == {("centre", 4)}
    assert len(rows) == 2 + 5
    assert "off centre" not in capsys.readouterr().out


def test_shuffled_labels_of_one_image_that_is_not_square_are_scored(painted):
    resized(painted, (120, 120), "0", "1", "3")

    rows = scored(painted, parts=("shuffled-heads",))

    assert [(row["view"], row["images"]) for row in rows[:2]] == [("centre", 4), ("off centre", 1)]


def test_a_block_that_only_others_read_is_not_looked_at(painted):
    rows = scored(painted, parts=("heads", "grid"), encoder_block=(3, 11))

    assert [row["method"] for row in rows[:4:2]] == [f"heads on {TINY} parts 3", f"grid on {TINY} parts 6"]
    assert rows[4]["method"] == "bands"


@pytest.mark.parametrize("name", NAMES)
def test_the_block_matters_to_those_baselines_that_are_named_by_it(name):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    labellers = [open_token_labeller(name, encoder=TINY, grid=6, block=block, precision="fp32") for block in (1, 11)]

    (early, _), (late, _) = (labels_of([labeller], images, lambda count: None)[0] for labeller in labellers)

    assert np.array_equal(early, late) == (name not in READ_BLOCK)


def test_a_score_is_the_same_alone_and_in_company(painted):
    alone = scored(painted, parts=("kmeans-image",), encoder_block=(5,), num_parts=(3,))
    company = scored(painted, parts=("grid", "kmeans-image"), encoder_block=(5, 9), num_parts=(2, 3))

    method = f"kmeans-image on {TINY} block 5 parts 3"
    assert [row for row in company if row["method"] == method] == [row for row in alone if row["method"] == method]


def test_runs_that_differ_in_their_seed_alone_have_a_stability(painted, tmp_path, learned):
    runs = [small_parts(tmp_path / f"seed{seed}", seed=seed) for seed in (1, 2)]
    for run in runs:  # learned on equal images, in another folder
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"images": "photos"}))

    rows = scored(painted, parts=(*map(str, runs), str(learned), "grid"), grid=4)

    values = {row["method"].partition(" on ")[0]: row["stability"] for row in rows}
    seeds = {row["method"].partition(" on ")[0]: row["seed"] for row in rows}
    assert values[str(runs[0])] == values[str(runs[1])]
    assert 0 < values[str(runs[0])] <= 1
    assert values[str(learned)] is values["grid"] is None
    assert [seeds[str(run)] for run in (*runs, learned)] == [1, 2, 0]


def test_a_run_beside_its_copy_is_fully_stable(painted, tmp_path, learned):
    shutil.copytree(learned, tmp_path / "copy")

    rows = scored(painted, parts=(str(learned), str(tmp_path / "copy")), grid=4)

    assert [row["stability"] for row in rows[:2]] == [1, 1]  # the images are square, so they have one view


def test_no_part_of_a_learner_without_a_background_is_taken_for_one(painted, tmp_path):
    run = small_parts(tmp_path / "parts", background=False, where="everywhere")

    rows = scored(painted, parts=(str(run),), grid=4)

    assert (rows[0]["parts"], len(rows[0]["areas"])) == (3, 3)
    assert all(share > 0 for share in rows[0]["areas"])
    assert rows[0]["speckle_inside"] == rows[0]["speckle"]


def test_a_learner_on_another_grid_than_the_controls_is_refused(painted, learned):
    with pytest.raises(ValueError, match=r"labels 4 cells a side, but .* of this table 8, .*; pass --grid 4"):
        scored(painted, parts=(str(learned), "grid"))


def test_shuffled_labels_are_those_of_the_next_image_and_no_batch_has_one_alone():
    images = np.random.default_rng(0).integers(0, 256, (BATCH + 1, 64, 64, 3), dtype=np.uint8)
    labellers = [
        open_token_labeller(name, encoder=TINY, grid=4, precision="fp32") for name in ("heads", "shuffled-heads")
    ]

    (own, _), (shuffled, _) = labels_of(labellers, images, lambda count: None)

    assert len(shuffled) == BATCH + 1
    assert np.array_equal(shuffled[0], own[1])
    assert np.array_equal(shuffled[-2], own[-1])


def test_a_foreground_below_the_centre_prior_is_never_silent(painted, capsys):
    for path in (painted / "labels").iterdir():  # an object in the middle, of which noise knows nothing
        with Image.open(path) as image:
            width, height = image.size
        labels = np.zeros((height, width), np.uint8)
        labels[height // 3 : height - height // 3, width // 3 : width - width // 3] = 1
        Image.fromarray(labels).save(path)

    rows = scored(painted, parts=("grid", "bands"))

    aps = {(row["method"], row["view"]): row["foreground_ap"] for row in rows}
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4
    assert aps[f"grid on {TINY} parts 6", "centre"] < aps["centre", "centre"]
    assert warnings[0].startswith(f"warning: grid on {TINY} parts 6 ranks the foreground of {painted} (centre)")
    assert warnings[0].endswith(f"centre {aps['centre', 'centre']:.3f}")


def test_where_all_is_foreground_no_rank_is_below_another(painted, capsys):
    for path in (painted / "labels").iterdir():
        with Image.open(path) as image:
            Image.fromarray(np.maximum(np.asarray(image), 1)).save(path)

    rows = scored(painted, parts=("grid",))

    assert all(row["foreground_ap"] in (1.0, None) for row in rows)
    assert "warning" not in capsys.readouterr().err


def test_a_row_is_compared_with_the_centre_of_its_own_set_and_view():
    def row(method: str, set_: str, view: str, ap: float | None) -> dict[str, Any]:
        return {"method": method, "set": set_, "view": view, "foreground_ap": ap}

    rows = [row("a", "s", "centre", 0.5), row("a", "s", "off centre", 0.5), row("a", "t", "centre", None)]
    rows += [row("b", "s", "off centre", 0.2), row("b", "t", "centre", 0.7), row("b", "s", "centre", 0.6 - 1e-12)]
    controls = [row("centre", "s", "centre", 0.6), row("centre", "s", "off centre", 0.3)]
    controls += [row("centre", "t", "centre", None), row("darkness", "s", "centre", 0.9)]

    assert below_centre(rows, controls) == [(rows[0], 0.6), (rows[3], 0.3)]


def test_names_in_the_table_are_short_where_that_tells_methods_apart():
    ends = (" block 9 parts 6", " block 11 parts 6")
    dino, same = "heads on timm:vit=/a/dino.pth", "heads on timm:vit=/b/other.pth"

    short = short_names(
        [
            f"{dino}{ends[0]}",
            f"{dino}{ends[1]}",
            f"{same}{ends[1]}",
            f"heads on random:vit{ends[0]}",
            "grid on timm:vit=/a/dino.pth parts 6",
            "builtin on builtin block 3 parts 6",
            "bands parts 6",
        ]
    )

    assert list(short.values()) == [
        "heads on vit block 9 parts 6",
        f"{dino}{ends[1]}",
        f"{same}{ends[1]}",
        "heads on random:vit block 9 parts 6",
        "grid on vit parts 6",
        "builtin on builtin block 3 parts 6",
        "bands parts 6",
    ]


def test_baselines_stand_on_the_encoder_of_the_first_learner_or_on_small(painted, tmp_path):
    images, run = str(painted / "images"), RunConfig(out=tmp_path / "run", device="cpu", precision="fp32")
    learn(LearnConfig(images=images, encoder=TINY, grid=GRID, crops=1, run=run))

    for parts, encoder in ((("grid", str(run.out)), TINY), (("grid",), "builtin")):
        rows = scored(painted, parts=parts, encoder=())
        assert f"grid on {encoder} parts 6" in {row["method"] for row in rows}


def test_the_table_fits_eighty_columns(painted, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    rows = scored(painted, parts=("heads", "grid"))
    capsys.readouterr()
    for row in rows:
        row |= {"stability": 0.123, "beyond_other": -0.042, "parts_used": 12.3}

    _print(rows)

    told = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, told.splitlines())) <= 80
    assert "…" not in told
    for row in rows:
        line = [_figure(row[column]) for column in SHOWN]
        assert any(
            found.split()[-len(list(filter(None, line))) :] == list(filter(None, line)) for found in told.splitlines()
        )


def test_baselines_without_a_count_are_a_sentence(painted):
    with pytest.raises(ValueError, match="num_parts needs numbers between 1 and 255"):
        scored(painted, parts=("grid",), num_parts=())


def test_flips_are_judged_by_labels_of_the_mirrored_images(painted):
    truths = TruthSet(painted)
    labeller = open_token_labeller("heads", encoder=TINY, grid=GRID, precision="fp32")
    images = truths.centre(size=120, grid=GRID).images
    (here, _), (mirrored, _) = (
        labels_of([labeller], pixels, lambda count: None)[0] for pixels in (images, np.flip(images, axis=2).copy())
    )

    ((rows, _),) = score_labellers([labeller], truths, size=120, advance=lambda count: None)

    assert rows[0]["flip_agreement"] == pytest.approx(flip_agreement(here, mirrored))
    assert rows[0]["flip_inside"] == pytest.approx(flip_inside(here, mirrored))
    assert flip_agreement(here, mirrored) != pytest.approx(flip_agreement(here, here))
