"""Stored cells to patches: any number of either, by area."""

from fractions import Fraction

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.masking.patches import best_patches, kept_count, pool_labels, pool_mean

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def overlaps(cells: tuple[int, int], patches: tuple[int, int]) -> dict[int, dict[tuple[int, int], Fraction]]:
    """Area of each cell in each patch, in exact fractions of the image."""

    def along(count: int, parts: int) -> list[dict[int, Fraction]]:
        found = []
        for part in range(parts):
            first, last = Fraction(part, parts), Fraction(part + 1, parts)
            shares = {at: min(last, Fraction(at + 1, count)) - max(first, Fraction(at, count)) for at in range(count)}
            found.append({at: share for at, share in shares.items() if share > 0})
        return found

    down, across = along(cells[0], patches[0]), along(cells[1], patches[1])
    return {
        row * patches[1] + col: {(y, x): h * w for y, h in down[row].items() for x, w in across[col].items()}
        for row in range(patches[0])
        for col in range(patches[1])
    }


@given(cells=shapes, patches=shapes, groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_patch_has_the_label_that_covers_most_of_it_and_of_equals_the_lower(cells, patches, groups, seed):
    parts = np.random.default_rng(seed).integers(0, groups, (2, *cells)).astype(np.uint8)

    pooled = pool_labels(torch.from_numpy(parts), patches)

    for image in range(2):
        for patch, areas in overlaps(cells, patches).items():
            covered = {label: Fraction(0) for label in range(groups)}
            for cell, area in areas.items():
                covered[int(parts[image][cell])] += area
            assert pooled[image, patch] == min(covered, key=lambda label: (-covered[label], label))


@given(cells=shapes, patches=shapes, seed=st.integers(0, 99))
def test_a_patchs_mean_is_over_its_area(cells, patches, seed):
    values = np.random.default_rng(seed).integers(0, 784, (1, 2, *cells)).astype(float)

    pooled = pool_mean(torch.from_numpy(values), patches)

    for patch, areas in overlaps(cells, patches).items():
        for head in range(2):
            total = sum(area * int(values[0, head][cell]) for cell, area in areas.items())
            expected = float(total / sum(areas.values()))
            assert abs(pooled[0, head, patch].item() - expected) < 1e-9


def test_patches_of_14_pixels_read_28_cells_of_8():
    """224 px: 16 patches of 14 px a side. The first is cell 0 and three quarters of cell 1, down and across."""
    parts = torch.zeros(1, 28, 28, dtype=torch.uint8)
    parts[0, :2, 1], parts[0, 1, 0] = 1, 2

    pooled = pool_labels(parts, (16, 16))

    assert pooled.shape == (1, 256)
    assert pooled[0, 0] == 1  # areas 16 of label 0, 12 + 9 of 1, 12 of 2


def test_labels_as_great_as_a_byte_pool_like_any():
    parts = torch.tensor([[[255, 255], [254, 0]]], dtype=torch.uint8)

    assert pool_labels(parts, (1, 1)).tolist() == [[255]]


def test_the_quarter_best_in_foreground_is_kept():
    fgrank = torch.randperm(784).reshape(1, 28, 28)

    kept = best_patches(fgrank, (28, 28), 0.25)

    assert kept_count((28, 28), 0.25) == 196
    assert sorted(fgrank.flatten()[kept[0]].tolist()) == list(range(196))
    assert kept[0].tolist() == sorted(kept[0].tolist())


def test_of_patches_equally_good_the_first_are_kept():
    fgrank = torch.tensor([[[0, 3, 9, 9], [3, 0, 9, 9]]])

    assert best_patches(fgrank, (1, 2), 0.5).tolist() == [[0]]
    assert best_patches(torch.tensor([[[1, 1, 0, 1]]]), (1, 4), 0.5).tolist() == [[0, 2]]
