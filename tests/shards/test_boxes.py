"""Boxes of images in a text file."""

from pathlib import Path

import pytest

from shards.boxes import BoxFile


def boxes(folder: Path, text: str, *names: str) -> BoxFile:
    (folder / "boxes.txt").write_text(text)
    return BoxFile(folder / "boxes.txt", names)


def test_inside_is_from_the_first_pixel_to_the_last_of_every_box_of_the_image(tmp_path):
    found = boxes(tmp_path, "a.jpg 1 0 2 0\n\nmy b.jpg 0 0 0 0\na.jpg 4 2 4 2\n", "a.jpg", "my b.jpg")

    assert found.read_for("a.jpg", (5, 3)).tolist() == [[0, 1, 1, 0, 0], [0] * 5, [0, 0, 0, 0, 1]]
    assert found.read_for("my b.jpg", (2, 1)).tolist() == [[1, 0]]
    assert found.count_parts(["a.jpg"]) == 1


def test_what_is_drawn_of_an_image_is_what_its_digest_is_of(tmp_path):
    found = boxes(tmp_path, "a.jpg 1 0 2 0\nb.jpg 0 0 0 0\na.jpg 4 2 4 2\n", "a.jpg")

    assert found.digests(["a.jpg"]) == {"a.jpg": [(1, 0, 2, 0), (4, 2, 4, 2)]}


def test_a_file_may_name_images_from_further_up_and_others_besides(tmp_path):
    text = "val/dog/9.jpg 0 0 1 1\ntrain/cat/1.jpg 0 0 0 0\ntrain/dog/1.jpg 1 1 1 1\n"

    found = boxes(tmp_path, text, "cat/1.jpg", "dog/1.jpg")

    assert found.read_for("dog/1.jpg", (2, 2)).tolist() == [[0, 0], [0, 1]]
    assert found.unused == 1


def test_names_as_they_are_go_before_longer_ones(tmp_path):
    found = boxes(tmp_path, "old/1.jpg 0 0 1 1\n1.jpg 0 0 0 0\n", "1.jpg")

    assert found.read_for("1.jpg", (2, 1)).tolist() == [[1, 0]]


def test_images_without_a_box_are_counted_and_one_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 3 images have no box in .*boxes\.txt, the first is b\.jpg; give each"):
        boxes(tmp_path, "a.jpg 0 0 1 1\n", "a.jpg", "b.jpg", "c.jpg")


def test_a_name_that_may_be_two_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has boxes of train/1\.jpg and val/1\.jpg, whose images may be the same"):
        boxes(tmp_path, "train/1.jpg 0 0 1 1\nval/1.jpg 0 0 1 1\n", "1.jpg")


@pytest.mark.parametrize("box", ["0 0 3 1", "0 0 1 2", "-1 0 1 1", "0 -1 1 1", "2 0 1 1", "0 1 1 0"])
def test_a_box_that_does_not_lie_in_its_image_is_named(box, tmp_path):
    found = boxes(tmp_path, f"a.jpg {box}\n", "a.jpg")

    with pytest.raises(
        ValueError, match=rf"the box {box} of a\.jpg in .*boxes\.txt does not lie .* 3x2 pixels as shown"
    ):
        found.read_for("a.jpg", (3, 2))


@pytest.mark.parametrize("line", ["b.jpg 1 2 3", "b.jpg 1 2 3 4.5", "b.jpg", "b.jpg,1,2,3,4"])
def test_a_line_that_is_no_box_is_named(line, tmp_path):
    with pytest.raises(ValueError, match=r"line 2 of .*boxes\.txt is no box: '.*'; expected NAME X0 Y0 X1 Y1"):
        boxes(tmp_path, f"a.jpg 0 0 1 1\n{line}\n", "a.jpg")
