"""What a part learner going wrong is told."""

import torch
from torch.nn import functional as F

from partlearn.health import health, warnings_of

CELLS = torch.ones(2, 64, dtype=torch.bool)


def maps_of(labels: torch.Tensor, parts: int = 4) -> torch.Tensor:
    return F.one_hot(labels, parts).transpose(1, 2).float()


def said(maps: torch.Tensor, *, trained: bool = True) -> str:
    return " / ".join(warnings_of(health(maps, CELLS), maps.shape[1], trained=trained))


def quarters() -> torch.Tensor:
    rows, cols = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    return (2 * (rows // 4) + cols // 4).flatten().expand(2, -1)


def test_nothing_is_said_of_good_maps():
    assert said(maps_of(quarters())) == ""


def test_a_part_that_vanished_is_named_with_its_share():
    assert "part 3 covers 0.00% of the cells: it has vanished" in said(maps_of(quarters().clamp(max=2)))


def test_a_part_is_held_against_an_even_share_and_not_against_one_percent():
    """128 parts of eight cells each, in an image of 32 x 32."""
    rows, cols = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    even = (8 * (rows // 2) + cols // 4).flatten().expand(2, -1)
    cells = torch.ones(2, 32**2, dtype=torch.bool)

    figures = health(maps_of(even, 128), cells)

    assert figures["parts_used"] == 128
    assert warnings_of(figures, 128, trained=True) == []
    assert warnings_of(figures | {"area_5": 0.0004}, 128, trained=True) == [
        "part 5 covers 0.04% of the cells: it has vanished; ask for fewer --num-parts, or raise `balance`"
    ]


def test_where_no_step_was_taken_no_weight_of_the_loss_is_the_remedy():
    maps = maps_of(quarters().clamp(max=2))
    alike = torch.full((2, 4, 64), 0.25)

    assert "ask for fewer --num-parts, or read another --encoder-block" in said(maps, trained=False)
    assert "start from k-means, or read another --encoder-block" in said(alike, trained=False)
    assert "`balance`" in said(maps)
    assert "`diversity`" in said(alike)


def test_a_part_that_takes_all_is_told():
    assert "the largest part covers 100% of an image's cells" in said(maps_of(torch.zeros(2, 64, dtype=torch.int64)))


def test_equal_maps_are_told():
    assert "the maps are alike (mean cosine 1.00)" in said(torch.full((2, 4, 64), 0.25))


def test_speckle_is_told():
    rows, cols = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert "100% of the cells share their label with no neighbour" in said(
        maps_of(((rows + 2 * cols) % 4).flatten().expand(2, -1))
    )
