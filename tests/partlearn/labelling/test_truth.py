"""`extract --parts truth`: the stored labels are the part maps that are beside the images."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import tars
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from partlearn.config import ExtractConfig
from partlearn.labelling.protocol import open_labeller
from partlearn.labelling.shard import Builder
from partlearn.labelling.sources import Source, open_source
from partlearn.labelling.truth import depth_rank
from pipeline.config import VerifyConfig
from pipeline.extract import extract
from pipeline.verify import verify as verify_verb
from shards.atomic import read_json, sha256_json
from shards.shard_set import ShardSet
from shards.truth import cells_of
from shards.verify import verify
from training.config import RunConfig

GRID, PARTS, COUNT = 6, 4, 10


@pytest.fixture
def folder(tmp_path) -> Path:
    """Wide and high images of noise, part 4 and unknown pixels in some of the maps; the first has no part."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for number in range(COUNT):
        height, width = random.integers(30, 61, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"set/images/{number}.jpg")
        ids = np.zeros((height, width), np.uint8)
        for part in range(PARTS + 1) if number else ():
            y, x = random.integers(0, height - 15), random.integers(0, width - 15)
            ids[y : y + 15, x : x + 15] = 255 if part == 0 else part
        Image.fromarray(ids).save(tmp_path / f"set/labels/{number}.png")
    return tmp_path / "set"


def config(out: Path, **changes) -> ExtractConfig:
    settings = {"size": 32, "grid": GRID, "samples_per_shard": 4, "batch_size": 3, "backend": "local"} | changes
    run = RunConfig(out=out, device="cpu", precision="fp32")
    return ExtractConfig(parts=Path("truth"), run=run, **settings)


def true_labels(folder: Path, name: str) -> np.ndarray:
    """Of the centre square: part k is k - 1, the last is the background or unknown."""
    with Image.open(folder / "labels" / name.replace(".jpg", ".png")) as image:
        ids = np.asarray(image)
    height, width = ids.shape
    side = min(ids.shape)
    y0, x0 = round((height - side) / 2), round((width - side) / 2)
    cells = cells_of(ids[y0 : y0 + side, x0 : x0 + side], GRID)
    return np.where((cells == 0) | (cells == 255), PARTS, cells - 1)


def test_labels_are_the_cells_of_the_maps_and_the_foreground_ranks_first(folder, tmp_path):
    info = extract(config(tmp_path / "out", images=str(folder)))

    assert info["groups"] == PARTS + 1
    assert read_json(tmp_path / "out/plan.json")["groups"] == PARTS + 1
    assert info["producer"]["labels"]["truth"] == str(folder / "labels")
    assert verify(tmp_path / "out", "deep") == []
    with ShardSet.open(tmp_path / "out") as shards:
        assert sorted(shards.sources) == [f"{number}.jpg" for number in range(COUNT)]
        for index, name in enumerate(shards.sources):
            sample, true = shards.read(index), true_labels(folder, name)
            assert np.array_equal(sample.parts, true)
            foreground = sample.parts < PARTS
            assert (sample.fgrank[foreground] < foreground.sum()).all()
            assert np.array_equal(sample.fgrank, depth_rank(foreground))


def test_another_build_a_repaired_one_and_an_actor_give_the_same_bytes(folder, tmp_path):
    extract(config(tmp_path / "out", images=str(folder)))
    before = tars(tmp_path / "out")
    extract(config(tmp_path / "again", images=str(folder)))
    victim = tmp_path / "out/shards/000001.tar"

    victim.write_bytes(victim.read_bytes()[:-700])
    verify_verb(VerifyConfig(data=tmp_path / "out", repair=True))
    settings, (source, plan) = config(tmp_path / "again", images=str(folder)), source_and_plan(folder, tmp_path)
    truth, slice_ = pickle.loads(pickle.dumps((open_labeller(settings, source), source.slice(0))))
    Builder(settings, plan, truth).build(slice_)

    assert tars(tmp_path / "out") == tars(tmp_path / "again") == before


def source_and_plan(folder: Path, tmp_path: Path) -> tuple[Source, str]:
    """What the driver hands to an actor."""
    source = open_source(str(folder), None, size=32, quality=90, samples_per_shard=4, seed=0)
    return source, sha256_json(read_json(tmp_path / "again/plan.json"))


def test_labels_over_a_finished_set_are_the_same(folder, tmp_path, learned):
    run = RunConfig(out=tmp_path / "base", device="cpu", precision="fp32")
    extract(ExtractConfig(images=str(folder), parts=learned, size=32, samples_per_shard=4, backend="local", run=run))

    info = extract(config(tmp_path / "labels", relabel=tmp_path / "base"))

    assert (info["groups"], info["grid"]) == (PARTS + 1, GRID)
    with ShardSet.open(tmp_path / "base", labels=tmp_path / "labels") as shards:
        for index, name in enumerate(shards.sources):
            assert np.array_equal(shards.read(index).parts, true_labels(folder, name))


def test_masks_are_labels_of_one_part(folder, tmp_path):
    (folder / "labels").rename(folder / "masks")
    for path in (folder / "masks").iterdir():
        with Image.open(path) as ids:
            mask = np.where(np.asarray(ids) == 2, 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(path)

    info = extract(config(tmp_path / "out", images=str(folder)))

    assert info["groups"] == 2


def test_an_image_without_truth_is_named_before_the_build_starts(folder, tmp_path):
    (folder / "labels/3.png").unlink()

    with pytest.raises(FileNotFoundError, match=r"labels/3\.png is missing: every image needs its truth"):
        extract(config(tmp_path / "out", images=str(folder)))

    assert not (tmp_path / "out").exists()


def test_maps_that_changed_meanwhile_are_another_plan(folder, tmp_path):
    extract(config(tmp_path / "out", images=str(folder)))
    Image.fromarray(np.full((40, 40), 1, np.uint8)).save(folder / "labels/3.png")

    with pytest.raises(ValueError, match="other part maps"):
        extract(config(tmp_path / "out", images=str(folder)))


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (np.ones((9, 9), np.uint8), r"labels/3\.png is 9x9, but its image is"),
        (np.full((1, 1), 9, np.uint8), r"labels/3\.png has the part id 9, but the largest id there is is 4"),
    ],
)
def test_a_map_that_does_not_fit_its_image_is_named(ids, sentence, folder, tmp_path):
    (folder / "labels.txt").write_text("0\tbackground\n4\ttail\n")
    with Image.open(folder / "images/3.jpg") as image:
        size = image.size if ids.size == 1 else ids.shape
    Image.fromarray(np.resize(ids, size[::-1])).save(folder / "labels/3.png")

    with pytest.raises(ValueError, match=sentence):
        extract(config(tmp_path / "out", images=str(folder)))


def test_cells_finer_than_the_pixels_and_a_source_that_is_no_folder_are_sentences(folder, tmp_path):
    with pytest.raises(ValueError, match="pixels a side, its cells; choose a smaller --grid"):
        extract(config(tmp_path / "out", images=str(folder), grid=64))
    (tmp_path / "list.txt").write_text("set/images/0.jpg\n")
    with pytest.raises(ValueError, match=r"needs images from a local folder .*list\.txt"):
        extract(config(tmp_path / "other", images=str(tmp_path / "list.txt")))


@pytest.mark.parametrize("option", [{"attention": True}, {"encoder": "random:vit"}, {"encoder_block": 0}])
def test_what_an_encoder_would_do_is_refused(option, tmp_path):
    with pytest.raises(ValueError, match=r"looks through no encoder .*; leave out --attention"):
        config(tmp_path, images="photos", **option)


@given(side=st.integers(2, 7), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_rank_is_that_of_slow_distances(side, share, seed):
    inside = np.random.default_rng(seed).random((side, side)) < share
    cells = [(row, col) for row in range(-1, side + 1) for col in range(-1, side + 1)]
    within = [cell for cell in cells if min(cell) >= 0 and max(cell) < side]
    one_kind = inside.all() or not inside.any()

    def depth(at: tuple[int, int]) -> float:
        if one_kind:
            others = [cell for cell in cells if cell not in within]
        else:
            others = [cell for cell in within if inside[cell] != inside[at]]
        nearest = min((row - at[0]) ** 2 + (col - at[1]) ** 2 for row, col in others)
        return nearest if inside[at] or one_kind else -nearest

    rank = depth_rank(inside)

    order = sorted(within, key=lambda cell: (-depth(cell), cell))
    assert [int(rank[cell]) for cell in order] == list(range(side * side))


def test_the_deepest_cell_is_first_and_the_background_beside_it_before_the_rest():
    inside = np.zeros((5, 5), bool)
    inside[0:3, 0:3] = True

    rank = depth_rank(inside)

    assert rank[0, 0] == 0  # three steps from any background; beyond the border is none
    assert sorted(rank[inside].tolist()) == list(range(9))
    assert rank[3, 3] > rank[3, 0]
    assert rank[4, 4] == 24
