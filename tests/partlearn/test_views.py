"""Batches of images, crops and colours."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reference.distillation import bilinear
from torch.nn import functional as F

from shards.image_batches import ImageBatches
from shards.images import list_images
from training.augment import crop, jitter_colour, random_boxes
from training.block_masks import block_masks

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
UPRIGHT, MIRRORED = torch.tensor([False]), torch.tensor([True])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def test_the_whole_image_at_its_own_size_is_itself():
    images = torch.rand(1, 3, 12, 12)

    assert torch.allclose(crop(images, WHOLE, 12, UPRIGHT), images, atol=1e-5)


def test_the_whole_image_at_a_larger_size_is_torchs_resize():
    images = torch.rand(1, 3, 12, 12)

    resized = F.interpolate(images, size=20, mode="bilinear", align_corners=False)

    assert torch.allclose(crop(images, WHOLE, 20, UPRIGHT), resized, atol=1e-5)


def test_flipped_is_the_mirror_image():
    images, boxes = torch.rand(1, 3, 16, 16), torch.tensor([[0.1, 0.3, 0.7, 0.8]])

    assert torch.allclose(crop(images, boxes, 9, MIRRORED), crop(images, boxes, 9, UPRIGHT).flip(-1), atol=1e-5)


@given(seed=st.integers(0, 99))
def test_a_crop_is_bilinear_samples_of_its_box(seed):
    images = torch.rand(2, 3, 10, 14, generator=seeded(seed))
    boxes = random_boxes(2, scale=(0.1, 0.6), generator=seeded(seed))

    cropped = crop(images, boxes, 8, torch.zeros(2, dtype=torch.bool))

    for b, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        for row, column in ((0, 0), (3, 5), (7, 7)):
            x, y = x0 + (x1 - x0) * (column + 0.5) / 8, y0 + (y1 - y0) * (row + 0.5) / 8
            expected = bilinear(images[b, 1], 14 * x, 10 * y)
            assert cropped[b, 1, row, column].item() == pytest.approx(expected, abs=1e-4)


def test_an_image_shrunk_a_lot_keeps_its_mean():
    images = (torch.rand(1, 3, 256, 256, generator=seeded()) > 0.5).float()

    small = crop(images, WHOLE, 16, UPRIGHT)

    assert small.std() < 0.1  # samples of single pixels would deviate by 0.5


@given(low=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_boxes_lie_inside_and_are_no_larger_than_asked(low, seed):
    boxes = random_boxes(64, scale=(low, 1.0), generator=seeded(seed))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]

    assert boxes.min() >= 0
    assert boxes.max() <= 1 + 1e-6
    assert (width > 0).all()
    assert (width * height <= 1 + 1e-6).all()
    assert (width / height).max() < 1.34


@given(grid=st.integers(2, 14), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_masks_mask_exactly_their_share(grid, share, seed):
    masks = block_masks(3, grid, share=share, generator=seeded(seed))

    assert (masks.sum(dim=1) == round(share * grid * grid)).all()


def test_masks_come_in_blocks():
    masks = block_masks(200, 12, share=0.3, generator=seeded()).reshape(-1, 12, 12)

    neighbour_hidden = masks[:, :, 1:][masks[:, :, :-1]].float().mean()

    assert neighbour_hidden > 0.6  # 0.3 if patches were masked one by one


def test_colours_keep_their_range_and_each_image_has_its_own():
    images = torch.rand(1, 3, 8, 8).expand(32, -1, -1, -1)

    jittered = jitter_colour(images, strength=0.4, generator=seeded())

    assert jittered.min() >= 0
    assert jittered.max() <= 1
    assert len(jittered.mean(dim=(1, 2, 3)).unique()) == 32
    grey = (jittered.amax(dim=1) - jittered.amin(dim=1)).amax(dim=(1, 2)) < 1e-5
    assert 1 <= grey.sum() <= 14


def test_no_jitter_leaves_colours_alone():
    images = torch.rand(32, 3, 8, 8)

    jittered = jitter_colour(images, strength=0.0, generator=seeded())

    same = (jittered - images).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert same.sum() >= 18  # the others turned grey
