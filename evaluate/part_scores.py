"""One labeller against pictures whose parts are known: the rows of `score-parts`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from evaluate.part_quality import Columns, ari, flip_agreement, score, shortcuts
from evaluate.truth import SHIFT, TruthSet, View
from partlearn.label import Labeller

BATCH = 16
Advance = Callable[[int], None]


def score_labeller(
    labeller: Labeller, pictures: TruthSet, *, size: int, advance: Advance
) -> tuple[list[dict[str, Any]], Integer[np.ndarray, "pictures grid grid"]]:
    """Rows of the centre and the off-centre squares, and the labels of the first, the background as 0.

    `flip_agreement` labels the mirrored centre squares; `shift_ari` compares the labels of two crops of one photograph,
    a quarter of their side apart, on the cells that both show.

    Args:
        size: Side of the pictures in pixels, as extraction would store them.
        advance: Told how many pictures were labelled.
    """
    centre = pictures.centre(size=size, grid=labeller.grid)
    parts, fgrank = labels_of(labeller, centre.images, advance)
    mirrored, _ = labels_of(labeller, np.ascontiguousarray(centre.images[:, :, ::-1]), advance)
    moved = [labels_of(labeller, view.images, advance)[0] for view in pictures.shifted(size=size, grid=labeller.grid)]
    held = {"flip_agreement": flip_agreement(parts, mirrored), "shift_ari": shift_ari(*moved)}
    off = pictures.off_centre(size=size, grid=labeller.grid)
    rows = [
        {"view": "centre"} | score(parts, fgrank, centre.truth, centre.images, labeller.groups) | held,
        {"view": "off centre"}
        | score(*labels_of(labeller, off.images, advance), off.truth, off.images, labeller.groups)
        | held,
    ]
    return rows, parts


def control_rows(pictures: TruthSet, *, size: int, grid: int, groups: int) -> list[dict[str, Any]]:
    """What position and colour alone score, by the same measures."""
    views: dict[str, View] = {
        "centre": pictures.centre(size=size, grid=grid),
        "off centre": pictures.off_centre(size=size, grid=grid),
    }
    nothing: Columns = {"flip_agreement": None, "shift_ari": None}
    return [
        {"method": name, "view": view} | columns | nothing
        for view, seen in views.items()
        for name, columns in shortcuts(seen.truth, seen.images, groups).items()
    ]


def labels_of(
    labeller: Labeller, images: UInt8[np.ndarray, "pictures side side 3"], advance: Advance
) -> tuple[Integer[np.ndarray, "pictures grid grid"], Integer[np.ndarray, "pictures grid grid"]]:
    """Labels with the background, where there is one, as 0, and foreground ranks."""
    parts, fgrank = [], []
    for start in range(0, len(images), BATCH):
        labels = labeller(images[start : start + BATCH])
        parts.append(labels.parts)
        fgrank.append(labels.fgrank)
        advance(len(labels.parts))
    return background_first(np.concatenate(parts), labeller.groups), np.concatenate(fgrank).astype(np.int64)


def background_first(
    parts: Integer[np.ndarray, "pictures grid grid"], groups: int
) -> Integer[np.ndarray, "pictures grid grid"]:
    """Stored labels count parts from 0 and name the background last; truth has it first, as 0."""
    return (parts.astype(np.int64) + 1) % groups


def shift_ari(
    left: Integer[np.ndarray, "pictures grid grid"], right: Integer[np.ndarray, "pictures grid grid"]
) -> float:
    """ARI of two crops' labels on the cells both show; `right` begins SHIFT of a side further right. Mean over
    pictures. Bands follow no object, yet agree; a code of columns does not."""
    cells = round(SHIFT * left.shape[-1])
    pairs = zip(left[:, :, cells:], right[:, :, :-cells], strict=True)
    return float(np.mean([ari(one.ravel(), other.ravel()) for one, other in pairs]))
