"""Overlap of a foreground rank, cut into object and background, with the true foreground."""

import numpy as np
from jaxtyping import Bool, Float, Int, Integer


def best_iou(scores: Float[np.ndarray, " cells"], truth: Bool[np.ndarray, " cells"]) -> float | None:
    """max_n |S_n and T| / |S_n or T|, S_n the cells of the n highest distinct scores: the cut is told the truth.

    None without a true cell.
    """
    if not truth.any():
        return None
    found, taken = at_thresholds(scores, truth)
    return float((found / (taken + truth.sum() - found)).max())


def quarter_iou(
    rank: Integer[np.ndarray, " cells"], truth: Bool[np.ndarray, " cells"], known: Bool[np.ndarray, " cells"]
) -> float | None:
    """|Q and T| / |Q or T| of the cells Q with rank < cells // 4, cells of unknown truth left out.

    None without a true cell.
    """
    quarter = (rank < len(rank) // 4) & known
    return float((quarter & truth).sum() / (quarter | truth).sum()) if truth.any() else None


def at_thresholds(
    scores: Float[np.ndarray, " cells"], truth: Bool[np.ndarray, " cells"]
) -> tuple[Int[np.ndarray, " thresholds"], Int[np.ndarray, " thresholds"]]:
    """True cells, and all cells, with a score of at least each distinct score, from the highest down."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    return np.cumsum(truth[order])[last], np.arange(1, len(scores) + 1)[last]
