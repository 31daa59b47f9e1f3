"""The loss that keeps labels on the object, against maps whose agreement is known."""

from contextlib import closing

import pytest
import torch
from conftest import photographs

from encoders.load import load_encoder
from partlearn.config import LearnConfig
from partlearn.consistency import consistency_loss, second_view
from partlearn.crops import CROP_SCALE, TokenCrops
from shards.image_batches import ImageBatches
from shards.images import list_images
from training.augment import crop, random_boxes, step_generator
from training.config import RunConfig

GRID = 8
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def halves(*, swapped: bool = False) -> torch.Tensor:
    """Part 0 on the left half of the grid, part 1 on the right; or the other way round."""
    left = (torch.arange(GRID**2) % GRID < GRID // 2).float()
    maps = torch.stack([left, 1 - left])[None]
    return maps.flip(1) if swapped else maps


def unlike(maps, again, boxes=WHOLE, *, mirrored=False, cells=None) -> float:
    everywhere = torch.ones(1, GRID**2, dtype=torch.bool)
    cells = everywhere if cells is None else cells
    return consistency_loss(maps, cells, again, everywhere, boxes, torch.tensor([mirrored])).item()


def test_equal_maps_agree_and_exchanged_ones_do_not_at_all():
    assert unlike(halves(), halves()) == pytest.approx(0, abs=1e-6)
    assert unlike(halves(), halves(swapped=True)) == pytest.approx(1, abs=1e-6)


def test_a_mirrored_view_is_compared_with_the_mirrored_maps():
    assert unlike(halves(), halves(swapped=True), mirrored=True) == pytest.approx(0, abs=1e-6)


def test_a_crop_of_the_left_half_sees_the_left_part_alone():
    left = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    alone = torch.stack([torch.ones(GRID**2), torch.zeros(GRID**2)])[None]

    inner = torch.arange(GRID**2)[None] % GRID < GRID // 2 - 1  # the last column is blended with the other half
    assert unlike(halves(), alone, left, cells=inner) == pytest.approx(0, abs=1e-6)
    assert unlike(halves(), alone.flip(1), left, cells=inner) == pytest.approx(1, abs=1e-6)


def test_cells_outside_one_of_the_views_do_not_count():
    nowhere = torch.zeros(1, GRID**2, dtype=torch.bool)

    assert unlike(halves(), halves(swapped=True), cells=nowhere) == 0


def test_the_loss_pulls_on_both_views():
    logits = torch.randn(2, 1, 3, GRID**2, requires_grad=True)
    maps, again = logits.softmax(dim=2)

    everywhere = torch.ones(1, GRID**2, dtype=torch.bool)
    consistency_loss(maps, everywhere, again, everywhere, WHOLE, torch.tensor([True])).backward()

    assert (logits.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_two_ranks_look_where_one_does():
    encoder = load_encoder("random:vit_tiny_patch16_224", grid=4, precision="fp32")
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    one = second_view(pixels, encoder, generator=step_generator(5, 3))
    two = [
        second_view(half, encoder, generator=step_generator(5, 3), rank=rank, world_size=2)
        for rank, half in enumerate(pixels.split(2))
    ]

    assert torch.equal(one.boxes, torch.cat([view.boxes for view in two]))
    assert torch.equal(one.flip, torch.cat([view.flip for view in two]))
    tokens = torch.cat([view.tokens.patch_tokens for view in two])
    assert torch.allclose(one.tokens.patch_tokens, tokens, atol=1e-4)


def test_the_second_crop_is_drawn_apart_from_the_first(tmp_path):
    """Both of a step; from the same numbers, large crops would be seen again in large ones, and mirrored alike."""
    images = str(photographs(tmp_path / "photos", 6))
    run = RunConfig(out=tmp_path, device="cpu", precision="fp32")
    config = LearnConfig(images=images, encoder="x", grid=4, steps=1, consistency=1.0, batch_size=6, run=run)
    encoder = load_encoder("random:vit_tiny_patch16_224", grid=4, precision="fp32")

    with closing(TokenCrops(config, encoder, list_images(images)).batches(step=0)) as batches:
        again = next(batches).again

    first = random_boxes(6, scale=CROP_SCALE, generator=step_generator(0, 0))
    assert again is not None
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (first, again.boxes)]
    assert not torch.equal(areas[0].argsort(), areas[1].argsort())


def test_a_step_learns_from_crops_of_half_to_all_of_each_image(tmp_path):
    images = str(photographs(tmp_path / "photos", 6))
    run = RunConfig(out=tmp_path, device="cpu", precision="fp32")
    config = LearnConfig(images=images, encoder="x", grid=4, steps=1, crops=0, batch_size=6, seed=3, run=run)
    encoder = load_encoder("random:vit_tiny_patch16_224", grid=4, precision="fp32")

    with closing(TokenCrops(config, encoder, list_images(images)).batches(step=0)) as batches:
        taken = next(batches).pixels

    generator = step_generator(3, 0)
    boxes = random_boxes(6, scale=(0.5, 1.0), generator=generator)
    flip = torch.rand(6, generator=generator) < 0.5
    with ImageBatches(list_images(images), size=encoder.size, batch_size=6, seed=3) as whole:
        pixels, _ = next(iter(whole))
    expected = crop(pixels.permute(0, 3, 1, 2).float() / 255, boxes, encoder.size, flip)
    assert torch.equal(taken, (expected * 255).round().to(torch.uint8).permute(0, 2, 3, 1))


def test_kept_views_cannot_be_looked_at_again(tmp_path):
    run = RunConfig(out=tmp_path, device="cpu")

    with pytest.raises(ValueError, match="set crops to 0"):
        LearnConfig(images="x", encoder="builtin", consistency=1.0, crops=2, run=run)
    assert LearnConfig(images="x", encoder="builtin", consistency=1.0, steps=9, run=run).kept_crops == 0
