"""Endless seeded batches of images: their order, their pixels, and what cannot be read."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shards.image_batches import ImageBatches
from shards.images import list_images


@pytest.fixture
def listed(tmp_path):
    """Seven images, each of one grey level, 20 times its number."""
    for number in range(7):
        Image.new("RGB", (30, 20), (20 * number,) * 3).save(tmp_path / f"{number}.png")
    return list_images(tmp_path)


def taken(listed, count, **settings):
    with ImageBatches(listed, size=16, batch_size=3, seed=5, **settings) as batches:
        return list(islice(batches, count))


def test_starting_at_a_step_gives_the_batches_that_followed_it(listed):
    whole = taken(listed, 6, threads=1)

    rest = taken(listed, 3, step=3, threads=3)

    for (images, indices), (later_images, later_indices) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, later_images)
        assert torch.equal(indices, later_indices)


def test_every_image_comes_once_an_epoch(listed):
    indices = torch.cat([indices for _, indices in taken(listed, 7)])

    for epoch in indices.split(7):
        assert sorted(epoch.tolist()) == list(range(7))


def test_images_are_the_ones_their_indices_name(listed):
    for images, indices in taken(listed, 3):
        assert images.dtype == torch.uint8
        assert images.shape == (3, 16, 16, 3)
        assert (images == 20 * indices[:, None, None, None]).all()


def test_the_square_moves_along_the_long_side(tmp_path):
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (20, 200))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")

    with ImageBatches(list_images(tmp_path), size=20, batch_size=8, seed=0) as batches:
        images, _ = next(iter(batches))

    assert len({int(image[0, 0, 0]) for image in images}) > 4


def test_an_unreadable_image_is_replaced_by_the_next_and_told_once_a_process(listed, capfd):
    Path(listed.images[2].location).write_bytes(b"no image")

    indices = torch.cat([indices for _, indices in taken(listed, 14)])
    taken(listed, 3)

    for epoch in indices.split(7):
        assert sorted(epoch.tolist()) == [0, 1, 3, 3, 4, 5, 6]
    assert capfd.readouterr().err.count("2.png cannot be read") == 1


def test_nothing_but_unreadable_images_is_an_error(listed):
    for image in listed.images:
        Path(image.location).write_bytes(b"no image")

    with pytest.raises(ValueError, match="none of the 7 images can be read"):
        taken(listed, 1)
