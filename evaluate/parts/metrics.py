"""Agreement of part maps and foreground ranks with annotated parts, and of the controls with them.

Truth is a label a cell: 0 background, 255 unknown, else a part. Part maps use one label for a part in every
image, 0 for the background. A measure that does not apply (no such cells, one true part only) is None.
"""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8

from evaluate.parts.foreground import at_thresholds, best_iou, quarter_iou
from evaluate.parts.shortcuts import (
    bands,
    border_distance_rgb,
    centre_prior,
    colour_clusters,
    darkness,
)
from shards.truth import UNKNOWN

BANDS, STRATUM_BANDS, PERMUTATIONS = 6, 4, 10
OTHER_IMAGES = 3
PART_COLUMNS = ("beyond_shortcut", "beyond_other", "nmi", "ari", "nmi_image", "ari_image", "colour_nmi", "bands_nmi")
PART_COLUMNS += ("parts_used", "largest_share", "speckle", "speckle_inside")
FOREGROUND_COLUMNS = ("foreground_ap", "foreground_recall_quarter", "foreground_iou_best", "foreground_iou_quarter")
Columns = dict[str, float | None]


def score(
    parts: Integer[np.ndarray, "images grid grid"],
    fgrank: Integer[np.ndarray, "images grid grid"],
    truth_parts: Integer[np.ndarray, "images grid grid"],
    images: UInt8[np.ndarray, "images side side 3"],
    groups: int,
) -> Columns:
    """The columns of a `score-parts` row that follow from labels, ranks and truth.

    NMI and ARI are over the cells of the true foreground: of all images together (`nmi`: a label must mean
    the same everywhere), and within each image, averaged (`nmi_image`). `colour_nmi` and `bands_nmi` are over
    all cells: how much the labels follow colour and height. The shift test and the mirror image need other views.

    Args:
        fgrank: 0 for the cell most likely foreground.
        groups: Labels there are, the background included.

    Raises:
        ValueError: A label is not below `groups`.
    """
    if parts.size and int(parts.max()) >= groups:
        raise ValueError(f"part labels must lie below {groups}, the number of labels, got {int(parts.max())}")
    colours = colour_clusters(images, parts.shape[1])
    return _foreground_columns(-fgrank.astype(np.float64), truth_parts) | _part_columns(parts, truth_parts, colours)


def shortcuts(
    truth_parts: Integer[np.ndarray, "images grid grid"],
    images: UInt8[np.ndarray, "images side side 3"],
    groups: int,
) -> dict[str, Columns]:
    """The same columns for what knows no parts: as labels `bands` (as many as there are parts) and `colour`
    (RGB k-means); as foreground `centre`, `darkness` and `border_rgb`. Columns of the other kind are None."""
    grid = truth_parts.shape[1]
    colours = colour_clusters(images, grid)
    stripes = np.broadcast_to(1 + bands(grid, max(2, groups - 1)), truth_parts.shape)
    centre = np.broadcast_to(centre_prior(grid), truth_parts.shape)
    no_parts: Columns = dict.fromkeys(PART_COLUMNS)
    no_rank: Columns = dict.fromkeys(FOREGROUND_COLUMNS)
    ranks = {
        "centre": centre,
        "darkness": darkness(images, grid),
        "border_rgb": border_distance_rgb(images, grid),
    }
    return {
        "bands": no_rank | _part_columns(stripes, truth_parts, colours),
        "colour": no_rank | _part_columns(1 + colours, truth_parts, colours),
    } | {name: _foreground_columns(values, truth_parts) | no_parts for name, values in ranks.items()}


def average_precision(scores: Float[np.ndarray, " cells"], truth: Bool[np.ndarray, " cells"]) -> float | None:
    """AP = Σ_n (recall_n - recall_{n-1}) · precision_n over the distinct scores, from the highest down.

    Cells of equal score enter together, so their order does not matter. None without a true cell.
    """
    if not truth.any():
        return None
    found, taken = at_thresholds(scores, truth)
    return float((np.diff(found, prepend=0) / truth.sum() * found / taken).sum())


def recall_in_quarter(rank: Integer[np.ndarray, " cells"], truth: Bool[np.ndarray, " cells"]) -> float | None:
    """Share of the true cells whose rank is in the best quarter: |rank < cells // 4 and true| / |true|."""
    return float(truth[rank < len(rank) // 4].sum() / truth.sum()) if truth.any() else None


def nmi(labels: Integer[np.ndarray, " cells"], truth: Integer[np.ndarray, " cells"]) -> float:
    """Normalised mutual information, I(L; T) / ((H(L) + H(T)) / 2).

    The arithmetic mean of the entropies, as scikit-learn takes by default. 1 when both hold one value only.
    """
    table = contingency(labels, truth)
    mean = (_entropy(table.sum(axis=1)) + _entropy(table.sum(axis=0))) / 2
    return float(np.clip(_information(table) / mean, 0, 1)) if mean > 0 else 1.0


def ari(labels: Integer[np.ndarray, " cells"], truth: Integer[np.ndarray, " cells"]) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985), C(n) = n (n - 1) / 2, n_ij cells of label i and truth j:

        expected = Σ_i C(n_i.) · Σ_j C(n_.j) / C(n)
        ARI = (Σ_ij C(n_ij) - expected) / ((Σ_i C(n_i.) + Σ_j C(n_.j)) / 2 - expected)

    1 when the two partitions are trivially the same (the denominator is 0).
    """
    table = contingency(labels, truth).astype(np.float64)
    both, of_labels, of_truth = (_pairs(n).sum() for n in (table, table.sum(axis=1), table.sum(axis=0)))
    pairs = _pairs(table.sum())
    expected = of_labels * of_truth / pairs if pairs else 0.0
    span = (of_labels + of_truth) / 2 - expected
    return float((both - expected) / span) if span else 1.0


def beyond_shortcut(
    labels: Integer[np.ndarray, " cells"],
    truth: Integer[np.ndarray, " cells"],
    strata: Integer[np.ndarray, " cells"],
    seed: int = 0,
) -> float | None:
    """What the labels say of the truth beyond position and colour:

        (I(L; T | Z) - null) / H(T | Z)

    Z is a cell's stratum (4 bands x 6 RGB clusters in `score`); null is I with the labels permuted inside
    each stratum, the mean of ten permutations. Labels that follow from Z score 0; coherent regions that mean
    nothing keep a floor (random regions .13 on people), so read the order of methods, not the number. None when Z
    already tells the truth.
    """
    generator = np.random.default_rng(seed)
    information = null = uncertainty = 0.0
    for stratum in np.unique(strata):
        inside = strata == stratum
        own, true, weight = labels[inside], truth[inside], inside.mean()
        information += weight * _information(contingency(own, true))
        uncertainty += weight * _entropy(np.unique(true, return_counts=True)[1])
        drawn = [_information(contingency(generator.permutation(own), true)) for _ in range(PERMUTATIONS)]
        null += weight * np.mean(drawn)
    return float((information - null) / uncertainty) if uncertainty > 1e-12 else None


def beyond_other(
    parts: Integer[np.ndarray, "images grid grid"],
    truth: Integer[np.ndarray, "images grid grid"],
    strata: Integer[np.ndarray, "images grid grid"],
) -> float | None:
    """The same with another null: I of the labels that other images have at the same cells, the mean of three.

    Labels that follow position and colour score 0 or less, and coherent regions keep no floor; the null is harder
    than it must be where images are alike. None when the strata already tell the truth.
    """
    inside = foreground_cells(truth)
    true, levels = truth[inside], strata[inside]
    uncertainty = _given(levels, lambda here: _entropy(np.unique(true[here], return_counts=True)[1]))
    others = range(1, min(OTHER_IMAGES + 1, len(parts)))
    if uncertainty < 1e-12 or not others:
        return None

    def information(labels: np.ndarray) -> float:
        return _given(levels, lambda here: _information(contingency(labels[here], true[here])))

    null = np.mean([information(np.roll(parts, step, axis=0)[inside]) for step in others])
    return float((information(parts[inside]) - null) / uncertainty)


def speckle(parts: Integer[np.ndarray, "images rows cols"]) -> float:
    """Share of cells whose label none of their (up to four) neighbours has."""
    return float(_alone(parts).mean())


def speckle_inside(parts: Integer[np.ndarray, "images rows cols"]) -> float | None:
    """The same share of the cells outside the background, which is seldom speckled; None where there are none."""
    return float(_alone(parts)[parts > 0].mean()) if (parts > 0).any() else None


def parts_used(parts: Integer[np.ndarray, "images rows cols"]) -> float:
    """Different labels in an image, the background (0) not counted; the mean over images."""
    return float(np.mean([len(np.unique(image[image > 0])) for image in parts]))


def largest_share(parts: Integer[np.ndarray, "images rows cols"]) -> float | None:
    """The largest part's share of an image's cells outside the background; mean over images with any."""
    return _mean(np.bincount(own).max() / len(own) for own in (p[p > 0] for p in parts) if len(own))


def areas(parts: Integer[np.ndarray, "images rows cols"], groups: int) -> list[float] | None:
    """Each part's share of the cells outside the background, over all images; None where there are none.

    Args:
        groups: Labels there are, the background included.
    """
    cells = np.bincount(parts.ravel(), minlength=groups)[1:]
    return (cells / cells.sum()).tolist() if cells.any() else None


def flip_agreement(
    parts: Integer[np.ndarray, "images rows cols"], of_mirrored: Integer[np.ndarray, "images rows cols"]
) -> float:
    """Share of cells with the same label in an image and, mirrored back, in its mirror image."""
    return float((parts == of_mirrored[:, :, ::-1]).mean())


def flip_inside(
    parts: Integer[np.ndarray, "images rows cols"], of_mirrored: Integer[np.ndarray, "images rows cols"]
) -> float | None:
    """The same share of the cells that have a part in either; None where there are none."""
    back = of_mirrored[:, :, ::-1]
    inside = (parts > 0) | (back > 0)
    return float((parts == back)[inside].mean()) if inside.any() else None


def foreground_cells(
    truth_parts: Integer[np.ndarray, "*images rows cols"],
) -> Bool[np.ndarray, "*images rows cols"]:
    """Cells of any part: neither background nor unknown."""
    return (truth_parts > 0) & (truth_parts != UNKNOWN)


def contingency(
    labels: Integer[np.ndarray, " cells"], truth: Integer[np.ndarray, " cells"]
) -> Int[np.ndarray, "labels parts"]:
    """Cells with the i-th label and the j-th true part."""
    own, i = np.unique(labels, return_inverse=True)
    true, j = np.unique(truth, return_inverse=True)
    return np.bincount(i * len(true) + j, minlength=len(own) * len(true)).reshape(len(own), len(true))


def _part_columns(parts: np.ndarray, truth: np.ndarray, colours: np.ndarray) -> Columns:
    inside, grid = foreground_cells(truth), truth.shape[1]
    own, true = parts[inside], truth[inside]
    layers = np.broadcast_to(bands(grid, STRATUM_BANDS), truth.shape)
    all_bands = np.broadcast_to(bands(grid, BANDS), truth.shape)
    several = len(np.unique(true)) > 1
    pairs = [(p[i], t[i]) for p, t, i in zip(parts, truth, inside, strict=True) if len(np.unique(t[i])) > 1]
    strata = (colours * STRATUM_BANDS + layers)[inside]
    return {
        "beyond_shortcut": beyond_shortcut(own, true, strata) if several else None,
        "beyond_other": beyond_other(parts, truth, colours * STRATUM_BANDS + layers) if several else None,
        "nmi": nmi(own, true) if several else None,
        "ari": ari(own, true) if several else None,
        "nmi_image": _mean(nmi(p, t) for p, t in pairs),
        "ari_image": _mean(ari(p, t) for p, t in pairs),
        "colour_nmi": nmi(parts.ravel(), colours.ravel()),
        "bands_nmi": nmi(parts.ravel(), all_bands.ravel()),
        "parts_used": parts_used(parts),
        "largest_share": largest_share(parts),
        "speckle": speckle(parts),
        "speckle_inside": speckle_inside(parts),
    }


def _foreground_columns(scores: np.ndarray, truth: np.ndarray) -> Columns:
    """Per image over its known cells, then the mean over images with a foreground."""
    rows: list[tuple[float | None, ...]] = []
    for values, labels in zip(scores.reshape(len(truth), -1), truth.reshape(len(truth), -1), strict=True):
        inside, known = foreground_cells(labels[None])[0], labels != UNKNOWN
        rank = np.empty(len(values), dtype=np.int64)
        rank[np.argsort(-values, kind="stable")] = np.arange(len(values))
        rows.append(
            (
                average_precision(values[known], inside[known]),
                recall_in_quarter(rank, inside),
                best_iou(values[known], inside[known]),
                quarter_iou(rank, inside, known),
            )
        )
    return {name: _mean(row[place] for row in rows) for place, name in enumerate(FOREGROUND_COLUMNS)}


def _alone(parts: Integer[np.ndarray, "images rows cols"]) -> Bool[np.ndarray, "images rows cols"]:
    """Cells whose label none of their neighbours has."""
    down, right = parts[:, 1:] == parts[:, :-1], parts[:, :, 1:] == parts[:, :, :-1]
    matched = np.zeros(parts.shape, dtype=bool)
    matched[:, 1:] |= down
    matched[:, :-1] |= down
    matched[:, :, 1:] |= right
    matched[:, :, :-1] |= right
    return ~matched


def _given(strata: np.ndarray, measure: Callable[[np.ndarray], float]) -> float:
    """The mean of a measure over strata, each weighted by its cells."""
    return sum(float(here.mean()) * measure(here) for here in (strata == level for level in np.unique(strata)))


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _information(table: np.ndarray) -> float:
    """I = H(L) + H(T) - H(L, T), in nats."""
    return _entropy(table.sum(axis=1)) + _entropy(table.sum(axis=0)) - _entropy(table.ravel())


def _pairs(counts):
    return counts * (counts - 1) / 2


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
