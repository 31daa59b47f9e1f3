"""Do runs that differ in their seed alone find the same parts? Names aside: those are drawn with the seed."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Integer
from scipy.optimize import linear_sum_assignment


def stability(labellings: Sequence[Integer[np.ndarray, "images rows cols"]]) -> float:
    """The matched IoU of two runs' labels of the same cells; the mean over pairs of runs.

    Raises:
        ValueError: Fewer than two runs.
    """
    if len(labellings) < 2:
        raise ValueError(f"stability compares at least two runs, got {len(labellings)}")
    return float(np.mean([matched_iou(one, other) for one, other in combinations(labellings, 2)]))


def matched_iou(one: Integer[np.ndarray, "images rows cols"], other: Integer[np.ndarray, "images rows cols"]) -> float:
    """IoU of parts over the cells of all images, under the best one-to-one match π of their names:

        max_π Σ_i |one = i and other = π(i)| / |one = i or other = π(i)| / parts

    0, the background, is no part. `parts` is that of the labelling with more of them, so a part without a partner
    counts as 0. 1 when neither has any.
    """
    ours, theirs = (np.unique(labels[labels > 0]) for labels in (one, other))
    if not len(ours) and not len(theirs):
        return 1.0
    mine, its = one == ours[:, None, None, None], other == theirs[:, None, None, None]
    both = np.einsum("ipyx,jpyx->ij", mine.astype(np.int64), its.astype(np.int64))
    sizes, other_sizes = mine.sum(axis=(1, 2, 3)), its.sum(axis=(1, 2, 3))
    iou = both / (sizes[:, None] + other_sizes - both)
    return float(iou[linear_sum_assignment(iou, maximize=True)].sum() / max(iou.shape))
