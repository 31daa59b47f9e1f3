"""Whitening and diffusion of relative tokens against forms written out cell by cell."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from encoders.whitening import whitening_of
from partlearn.diffusion import TEMPERATURE, diffused


def unit_tokens(seed: int, cells: int = 9, dim: int = 5) -> torch.Tensor:
    return F.normalize(torch.randn(2, cells, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def walked(tokens: np.ndarray, inside: np.ndarray, rounds: int) -> np.ndarray:
    """The slow twin: one image, one cell at a time."""
    cells = len(tokens)
    walk = np.zeros((cells, cells))
    for p in range(cells):
        for q in range(cells):
            walk[p, q] = np.exp(tokens[p] @ tokens[q] / TEMPERATURE) if inside[q] else 0.0
        walk[p] /= walk[p].sum()
    moved = tokens
    for _ in range(rounds):
        moved = np.stack([sum(walk[p, q] * moved[q] for q in range(cells)) for p in range(cells)])
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), rounds=st.integers(1, 4), outside=st.sets(st.integers(0, 8), max_size=7))
def test_diffusion_is_a_random_walk_over_inside_cells(seed, rounds, outside):
    tokens = unit_tokens(seed)
    inside = torch.ones(2, 9, dtype=torch.bool)
    inside[:, list(outside)] = False

    found = diffused(tokens, inside, rounds)

    for image in range(2):
        expected = walked(tokens[image].double().numpy(), inside[image].numpy(), rounds)
        assert np.allclose(found[image].numpy(), expected, atol=1e-4)


def test_no_rounds_change_nothing():
    tokens = unit_tokens(0)

    assert diffused(tokens, torch.ones(2, 9, dtype=torch.bool), 0) is tokens


def test_diffusion_does_not_depend_on_where_cells_lie():
    tokens, inside = unit_tokens(1), torch.rand(2, 9) < 0.7
    order = torch.randperm(9)

    assert torch.allclose(
        diffused(tokens, inside, 2)[:, order], diffused(tokens[:, order], inside[:, order], 2), atol=1e-6
    )


def test_cells_of_a_noisy_part_come_to_agree():
    generator = torch.Generator().manual_seed(0)
    parts = F.normalize(torch.randn(3, 32, generator=generator), dim=1).repeat_interleave(30, dim=0)
    noisy = F.normalize(parts + 0.15 * torch.randn(90, 32, generator=generator), dim=1)

    clean = diffused(noisy[None], torch.ones(1, 90, dtype=torch.bool), 3)[0]

    assert (noisy * parts).sum(1).mean() < 0.85
    assert (clean * parts).sum(1).min() > 0.9


def test_whitened_points_are_uncorrelated_with_variance_one_along_the_largest_directions():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4000, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3

    whitening = whitening_of(points, 4)
    white = (points - points.mean(0)) @ whitening

    assert torch.allclose(white.T @ white / 4000, torch.eye(4), atol=1e-3)
    kept = torch.linalg.qr(whitening)[0]
    largest = torch.linalg.eigh(torch.cov(points.T, correction=0)).eigenvectors[:, -4:]
    assert torch.linalg.svdvals(kept.T @ largest).min() > 0.999
