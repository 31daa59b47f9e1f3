"""Labellers against images whose parts are known: the rows of `score-parts`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, UInt8

from evaluate.parts.metrics import areas, ari, flip_agreement, flip_inside, score, shortcuts
from evaluate.parts.views import SquareView, TruthSet, shift_cells
from partlearn.labelling.learned import TokenLabeller

BATCH = 16
LABELLINGS = 5
"""Times each image is looked at: centre, mirrored, two shifted crops, off centre."""
Advance = Callable[[int], None]
Seen = tuple[np.ndarray, np.ndarray]
"""Labels, the background as 0 where there is one, and foreground ranks: both [images, grid, grid]."""
Below = tuple[dict[str, Any], float]
"""A row, and the foreground AP of the centre prior that it fails to reach."""


def score_labellers(
    labellers: Sequence[TokenLabeller], truth: TruthSet, *, size: int, advance: Advance
) -> list[tuple[list[dict[str, Any]], np.ndarray]]:
    """Of each labeller: the rows of the centre squares and of the off-centre ones, where an image has any, and its
    labels of the first.

    `flip_agreement` and `flip_inside` label the mirrored centre squares; `shift_ari` compares the labels of two crops
    of one photograph, a quarter of their side apart, on the cells that both show. The encoder reads each image once
    for all labellers.

    Args:
        labellers: All on the same block of the same encoder.
        size: Side of the images in pixels, as extraction would store them.
        advance: Told how many images were read.
    """
    grid = labellers[0].grid
    centre = truth.centre(size=size, grid=grid)
    off = truth.ends(size=size, grid=grid)
    moved = off.off_centre
    mirrored = np.ascontiguousarray(centre.images[:, :, ::-1])
    views = [centre.images, mirrored, *(view.images for view in truth.shifted(size=size, grid=grid))]
    if moved.any():
        views.append(off.images)  # all of them: a shuffled baseline needs a next image
    else:
        advance(len(centre.images))
    seen = zip(*(labels_of(labellers, images, advance) for images in views), strict=True)
    told = []
    for labeller, (here, flipped, left, right, *ends) in zip(labellers, seen, strict=True):
        held = {
            "flip_agreement": flip_agreement(here[0], flipped[0]),
            "flip_inside": flip_inside(here[0], flipped[0]),
            "shift_ari": shift_ari(left[0], right[0]),
        }
        shown = [("centre", here, centre)]
        shown += [("off centre", (parts[moved], ranks[moved]), off.only(moved)) for parts, ranks in ends]
        rows = [
            {"view": name, "images": len(view.truth)}
            | score(labels[0], labels[1], view.truth, view.images, 1 + parts_of(labeller))
            | held
            | {"areas": areas(labels[0], 1 + parts_of(labeller))}
            for name, labels, view in shown
        ]
        told.append((rows, here[0]))
    return told


def control_rows(images: TruthSet, *, size: int, grid: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    """What position and colour alone score, by the same measures; how many parts there are matters to bands alone."""
    views: dict[str, SquareView] = {"centre": images.centre(size=size, grid=grid)}
    ends = images.ends(size=size, grid=grid)
    if ends.off_centre.any():
        views["off centre"] = ends.only(ends.off_centre)
    nothing = dict.fromkeys(("flip_agreement", "flip_inside", "shift_ari", "areas"))
    first = [
        {"method": name, "parts": counts[0], "view": view, "images": len(shown.truth)} | columns | nothing
        for view, shown in views.items()
        for name, columns in shortcuts(shown.truth, shown.images, 1 + counts[0]).items()
    ]
    others = [
        {"method": f"bands parts {count}", "parts": count, "view": view, "images": len(shown.truth)}
        | shortcuts(shown.truth, shown.images, 1 + count)["bands"]
        | nothing
        for count in counts[1:]
        for view, shown in views.items()
    ]
    return first + others


def below_centre(rows: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]]) -> list[Below]:
    """The rows whose foreground ranks worse, by AP, than closeness to the centre does in the same set and view.

    Where all is foreground every rank has AP 1, and a row of 1 - 1e-16 is not reported.
    """
    centre = {(row["set"], row["view"]): row["foreground_ap"] for row in controls if row["method"] == "centre"}
    pairs = [(row, row["foreground_ap"], centre[row["set"], row["view"]]) for row in rows]
    return [(row, prior) for row, own, prior in pairs if None not in (own, prior) and own < prior - 1e-6]


def labels_of(
    labellers: Sequence[TokenLabeller], images: UInt8[np.ndarray, "images side side 3"], advance: Advance
) -> list[Seen]:
    """What each labeller says of the images, in batches of like size: shuffled labels need a next image."""
    pieces: list[list[Seen]] = [[] for _ in labellers]
    for batch in np.array_split(images, -(-len(images) // BATCH)):
        tokens = labellers[0].encoder(torch.from_numpy(batch))
        for labeller, own in zip(labellers, pieces, strict=True):
            labels = labeller.of(tokens)
            own.append((background_first(labels.parts, 1 + parts_of(labeller)), labels.fgrank.astype(np.int64)))
        advance(len(batch))
    return [(np.concatenate([p for p, _ in own]), np.concatenate([r for _, r in own])) for own in pieces]


def parts_of(labeller: TokenLabeller) -> int:
    """Parts there are; the background, where there is one, is one group more."""
    return labeller.learner.shape.parts


def background_first(
    parts: Integer[np.ndarray, "images grid grid"], groups: int
) -> Integer[np.ndarray, "images grid grid"]:
    """Stored labels count parts from 0 and name the background last; truth has it first, as 0."""
    return (parts.astype(np.int64) + 1) % groups


def shift_ari(left: Integer[np.ndarray, "images grid grid"], right: Integer[np.ndarray, "images grid grid"]) -> float:
    """ARI of two crops' labels on the cells both show; `right` begins `shift_cells` further right. Mean over
    images. Bands follow no object and pass it; what follows columns does not."""
    cells = shift_cells(left.shape[-1])
    pairs = zip(left[:, :, cells:], right[:, :, :-cells], strict=True)
    return float(np.mean([ari(one.ravel(), other.ravel()) for one, other in pairs]))
