"""Files of true parts, and the labels of cells."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.truth import TruthFiles, cells_of


def drawn(folder: Path, kind: str, ids: np.ndarray) -> TruthFiles:
    """One map, of an image a.jpg."""
    (folder / kind).mkdir(parents=True)
    Image.fromarray(ids).save(folder / kind / "a.png")
    return TruthFiles(folder, ["a.jpg"])


def test_a_cell_takes_the_commonest_label_of_its_pixels():
    label_map = np.array([[1, 1, 7, 2], [1, 2, 255, 7], [3, 4, 0, 0]], dtype=np.uint8)

    # rows 0-1 and row 2; two of 2 and 7 would be equal, the lower wins
    assert cells_of(label_map, 2).tolist() == [[1, 7], [3, 0]]
    with pytest.raises(ValueError, match="at least 5 pixels"):
        cells_of(label_map, 5)


@given(height=st.integers(4, 13), width=st.integers(4, 13), seed=st.integers(0, 9))
def test_cells_are_those_of_a_slow_loop(height, width, seed):
    label_map = np.random.default_rng(seed).integers(0, 3, (height, width))

    found = cells_of(label_map, 4)

    for row in range(4):
        for col in range(4):
            inside = [
                label_map[y, x]
                for y in range(height)
                for x in range(width)
                if (y * 4 // height, x * 4 // width) == (row, col)
            ]
            assert found[row, col] == np.bincount(inside).argmax()


def test_parts_are_counted_from_the_maps_or_from_labels_txt_here_or_above(tmp_path):
    files = drawn(tmp_path / "train", "labels", np.array([[0, 3], [255, 1]], np.uint8))

    counts = [files.count_parts(["a.jpg"])]
    (tmp_path / "labels.txt").write_text("0\tbackground\n7\twheel\n255\tunknown\n")
    counts.append(files.count_parts(["a.jpg"]))
    (tmp_path / "train/labels.txt").write_text("0\tbackground\n12\twheel\n")
    counts.append(files.count_parts(["a.jpg"]))

    assert counts == [3, 7, 12]
    (tmp_path / "train/labels.txt").write_text("wheel 12\n")
    with pytest.raises(ValueError, match="begins with 'wheel', expected a part id"):
        files.count_parts(["a.jpg"])


def test_masks_are_one_part_whatever_their_depth(tmp_path):
    mask = np.array([[0, 255], [200, 100]], np.uint8)
    grey, black_and_white = drawn(tmp_path / "a", "masks", mask), drawn(tmp_path / "b", "masks", mask > 127)

    assert grey.read("a.jpg").tolist() == black_and_white.read("a.jpg").tolist() == [[0, 1], [1, 0]]
    assert grey.count_parts(["a.jpg"]) == 1


@pytest.mark.parametrize("fill", [0, 255])
def test_a_mask_may_be_all_background_or_all_object_but_not_of_part_ids(fill, tmp_path):
    whole = drawn(tmp_path / "a", "masks", np.full((2, 2), fill, np.uint8))
    ids = drawn(tmp_path / "b", "masks", np.array([[0, 1]], np.uint8))

    assert (whole.read("a.jpg") == (fill > 0)).all()
    with pytest.raises(ValueError, match=r"masks/a\.png holds values up to 1 and no 255; a mask is 0 and 255"):
        ids.read("a.jpg")


def test_images_without_truth_are_told_where_it_should_lie(tmp_path):
    drawn(tmp_path / "val", "labels", np.zeros((2, 2), np.uint8))
    layout = r"masks/a\.png is missing: .* images/NAME\.jpg beside labels/NAME\.png .* or masks/NAME\.png .* size"

    with pytest.raises(FileNotFoundError, match=f"{layout}$"):
        TruthFiles(tmp_path, ["a.jpg"])
    with pytest.raises(FileNotFoundError, match=f"{layout}; give {tmp_path}/val, not its images/"):
        TruthFiles(tmp_path / "val/images", ["a.jpg"])


def test_a_map_of_another_size_or_orientation_than_its_image_is_refused(tmp_path):
    files = drawn(tmp_path, "labels", np.zeros((3, 4), np.uint8))

    assert files.read_for("a.jpg", (4, 3)).shape == (3, 4)
    with pytest.raises(
        ValueError, match=r"labels/a\.png is 4x3, but its image is 3x4 as shown .* EXIF .* give the map"
    ):
        files.read_for("a.jpg", (3, 4))


def test_a_map_in_colours_is_refused(tmp_path):
    files = drawn(tmp_path, "labels", np.zeros((2, 2, 3), np.uint8))

    with pytest.raises(ValueError, match=r"a\.png has 3 channels, expected one"):
        files.read("a.jpg")
