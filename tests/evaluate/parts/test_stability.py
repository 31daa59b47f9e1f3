"""Agreement of runs up to the names of their parts: by hand, and by what must not change it."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluate.parts.stability import matched_iou, stability


def cells(*labels: int) -> np.ndarray:
    """One image of one row."""
    return np.array([[labels]])


def test_matched_iou_of_seven_cells_by_hand():
    """1 and 5 share two of four cells, 2 and 4 two of three; 1 and 4 share one of five, 2 and 5 none."""
    one, other = cells(0, 1, 1, 1, 2, 2, 0), cells(5, 5, 5, 4, 4, 4, 0)

    assert matched_iou(one, other) == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert matched_iou(other, one) == matched_iou(one, other)


def test_a_part_without_a_partner_counts_as_nothing():
    assert matched_iou(cells(1, 1, 2, 2), cells(1, 1, 0, 0)) == pytest.approx(1 / 2)
    assert matched_iou(cells(1, 1), cells(0, 0)) == 0
    assert matched_iou(cells(0, 0), cells(0, 0)) == 1


def test_the_match_is_the_best_in_sum():
    """The largest IoU alone (1 with 1, 3/7) would leave 2 with 2 (0); 1 with 2 and 2 with 1 have 2/5 each."""
    one, other = cells(1, 1, 1, 1, 1, 2, 2), cells(1, 1, 1, 2, 2, 1, 1)

    assert matched_iou(one, other) == pytest.approx(2 / 5)


def test_stability_is_the_mean_over_pairs_of_runs():
    runs = [cells(1, 1, 2, 2), cells(2, 2, 1, 1), cells(1, 1, 0, 0)]

    assert stability(runs) == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    with pytest.raises(ValueError, match="at least two runs, got 1"):
        stability(runs[:1])


@given(parts=st.integers(1, 6), seed=st.integers(0, 999))
def test_names_of_the_parts_do_not_matter(parts, seed):
    random = np.random.default_rng(seed)
    labels, other = random.integers(0, parts + 1, (2, 3, 4, 4))
    renamed = np.append(0, 1 + random.permutation(parts))

    assert matched_iou(labels, renamed[labels]) == pytest.approx(1)
    assert matched_iou(renamed[labels], other) == pytest.approx(matched_iou(labels, other))


def slowly_matched(one: np.ndarray, other: np.ndarray) -> float:
    """The best of all ways to pair the parts, by sets of cells."""
    ours, theirs = ([set(np.flatnonzero(x == part)) for part in np.unique(x[x > 0])] for x in (one, other))
    few, many = sorted((ours, theirs), key=len)
    if not many:
        return 1.0
    sums = [sum(len(a & b) / len(a | b) for a, b in zip(few, way, strict=False)) for way in permutations(many)]
    return max(sums) / len(many)


@given(parts=st.integers(1, 4), more=st.integers(0, 1), seed=st.integers(0, 999))
def test_matched_iou_is_the_best_over_all_pairings(parts, more, seed):
    random = np.random.default_rng(seed)
    one, other = random.integers(0, parts + 1, (2, 3, 3)), random.integers(0, parts + more + 1, (2, 3, 3))

    assert matched_iou(one, other) == pytest.approx(slowly_matched(one, other))
