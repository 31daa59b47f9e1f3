"""Crops and colours of batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.distillation import bilinear
from torch.nn import functional as F

from training.augment import crop, jitter_colour, random_boxes

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
UPRIGHT, MIRRORED = torch.tensor([False]), torch.tensor([True])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
