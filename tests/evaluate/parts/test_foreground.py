"""Overlap of a cut foreground rank with the truth, by hand."""

import numpy as np
import pytest

from evaluate.parts.foreground import best_iou, quarter_iou


def test_the_best_cut_by_hand():
    """Cuts after 1 to 4 cells: 1/2, 1/3, 2/3, 2/4."""
    scores, truth = np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False])

    assert best_iou(scores, truth) == pytest.approx(2 / 3)


def test_cells_of_equal_score_are_cut_together():
    truth = np.array([True, False, True, False])

    assert best_iou(np.zeros(4), truth) == pytest.approx(1 / 2)
    assert best_iou(np.array([1.0, 1.0, 0.0, 0.0]), truth) == pytest.approx(1 / 2)


def test_the_best_quarter_by_hand():
    """Two of eight cells are the best quarter, one of them true; three cells are true, and one is unknown."""
    rank, truth = np.arange(8), np.array([1, 0, 1, 0, 0, 0, 0, 1], dtype=bool)
    known = np.ones(8, dtype=bool)

    assert quarter_iou(rank, truth, known) == pytest.approx(1 / 4)
    known[1] = False
    assert quarter_iou(rank, truth, known) == pytest.approx(1 / 3)


def test_without_a_true_cell_there_is_no_overlap():
    nothing = np.zeros(8, dtype=bool)

    assert best_iou(np.arange(8.0), nothing) is None
    assert quarter_iou(np.arange(8), nothing, ~nothing) is None
