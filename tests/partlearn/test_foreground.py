"""Scorers of foreground and the confidence that there is one, on tokens whose object is known."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from encoders.frozen import Tokens
from partlearn.foreground import (
    border_distance,
    confidence,
    contrast,
    first_component,
    foreground_rank,
    foreground_score,
    normalised_cut,
    object_cells,
    otsu,
)

SIDE, DIM = 12, 16


def scene(*, apart: float) -> tuple[Tokens, torch.Tensor]:
    """Four images with a square object, its tokens `apart` away from the ground's."""
    generator = torch.Generator().manual_seed(0)
    ground, thing = F.normalize(torch.randn(2, DIM, generator=generator), dim=1)
    inside = torch.zeros(4, SIDE, SIDE, dtype=torch.bool)
    for number in range(4):
        inside[number, 2 + number : 7 + number, 3:8] = True
    cells = inside.flatten(1)
    tokens = ground + apart * cells[..., None] * (thing - ground)
    tokens = tokens + 0.05 * torch.randn(*tokens.shape, generator=generator)
    attention = (0.1 + cells.float())[:, None].expand(-1, 3, -1) / 100
    return Tokens(tokens.mean(1), tokens, torch.cat([tokens.mean(1, keepdim=True), tokens], 1), attention), cells


@pytest.mark.parametrize("scorer", ["contrast", "border", "component", "cut", "attention"])
def test_every_scorer_puts_the_object_first(scorer):
    tokens, cells = scene(apart=1.0)

    rank = foreground_rank(foreground_score(tokens, scorer))

    assert torch.equal(rank < 25, cells)


def test_contrast_forgives_a_border_that_a_few_odd_cells_spoil():
    """Four corner tokens of one large direction, as ViTs keep sums of the image there."""
    tokens, cells = scene(apart=1.0)
    odd = torch.zeros(tokens.patch_tokens.shape[2])
    odd[0] = 3.0
    spoilt = tokens.patch_tokens.clone()
    spoilt[:, [0, SIDE - 1, SIDE * (SIDE - 1), SIDE**2 - 1]] = odd
    looked_at = dataclasses.replace(tokens, patch_tokens=spoilt)

    def found(scorer) -> float:
        return (cells & (foreground_rank(foreground_score(looked_at, scorer)) < 25)).sum().item() / cells.sum().item()

    assert found("contrast") > found("border") + 0.1


def test_contrast_is_the_difference_of_two_cosines():
    tokens = torch.randn(1, 36, 5, generator=torch.Generator().manual_seed(0)).double()
    thing = object_cells(border_distance(tokens), None)[0]
    unit = [token / token.norm() for token in tokens[0]]
    means = [sum(u for u, mine in zip(unit, cells, strict=True) if mine) for cells in (thing, ~thing)]

    expected = [float(u @ means[0] / means[0].norm() - u @ means[1] / means[1].norm()) for u in unit]

    assert contrast(tokens)[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_cut_is_the_generalised_eigenvector_of_the_graph():
    tokens, _ = scene(apart=1.0)
    cut = normalised_cut(tokens.patch_tokens)[0].double()

    unit = F.normalize(tokens.patch_tokens[0], dim=-1)
    weights = torch.where(unit @ unit.T > 0.2, 1.0, 1e-5).double()
    degree = weights.sum(1)
    vector = cut - (degree * cut).sum() / degree.sum()  # undo the centring: D-orthogonal to the constant vector
    residual = degree * vector - weights @ vector
    value = (vector * residual).sum() / (degree * vector.square()).sum()
    assert (residual - value * degree * vector).norm() < 1e-3 * (degree * vector).norm()


def test_the_component_explains_the_most_variance():
    tokens, _ = scene(apart=0.5)
    unit = F.normalize(tokens.patch_tokens[0], dim=-1)

    along = first_component(tokens.patch_tokens)[0]

    assert along.square().sum() == pytest.approx(torch.linalg.svdvals(unit - unit.mean(0))[0].item() ** 2, rel=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 20), min_size=10, max_size=40))
def test_otsu_leaves_the_most_variance_between_the_groups(values):
    """The slow twin: every threshold, means computed again."""
    score = torch.tensor([values], dtype=torch.float64)
    ordered, cells = sorted(values, reverse=True), len(values)

    def between(k: int) -> float:
        best, rest = ordered[:k], ordered[k:]
        return k * (cells - k) * (sum(best) / k - sum(rest) / (cells - k)) ** 2

    allowed = [k for k in range(1, cells) if round(0.1 * cells) <= k <= round(0.6 * cells)]
    assert between(int(otsu(score.float()))) == pytest.approx(max(map(between, allowed)), rel=1e-4, abs=1e-4)


def test_the_object_is_found_whatever_its_size():
    for side in (4, 6, 8):
        cells = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        cells[1 : 1 + side, 2 : 2 + side] = True
        score = cells.float() + 0.2 * torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(side))

        assert torch.equal(object_cells(score.reshape(1, -1), None)[0], cells.flatten())
        assert object_cells(score.reshape(1, -1), 0.25).sum() == 36


def test_confidence_falls_with_the_object():
    figures = []
    for apart in (1.0, 0.3, 0.0):
        tokens, _ = scene(apart=apart)
        rank = foreground_rank(foreground_score(tokens, "border"))
        figures.append(confidence(tokens.patch_tokens, rank).mean().item())

    assert figures[0] > 0.3 > figures[1] > 0.05
    assert figures[2] < 0.02


def test_confidence_is_the_gap_of_border_distances():
    side = 4
    tokens = torch.tensor([[1.0, 0.0]]).repeat(side * side, 1)
    tokens[[5, 6, 9, 10]] = torch.tensor([0.0, 1.0])  # the four inner cells, at a right angle to the border
    rank = foreground_rank(border_distance(tokens[None]))

    assert confidence(tokens[None], rank).tolist() == pytest.approx([1.0])
