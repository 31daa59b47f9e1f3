"""True parts or boxes as a source of labels: what a perfect part learner would store, as the upper end of a scale."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt16
from scipy import ndimage

from partlearn.config import TRUTH
from partlearn.labelling.sources import Source, Stored
from partlearn.labelling.stored_labels import Labels
from shards.atomic import sha256_json
from shards.boxes import BoxFile
from shards.crops import reranked
from shards.truth import UNKNOWN, TruthFiles, cells_of


class TruthLabeller:
    """Labels of part maps or boxes that people drew (`shards/truth.py`, `shards/boxes.py`); it looks at no pixel.

    Part id k becomes the label k - 1; background and unknown cells have the last label. There are as many labels in
    every image: see `TruthFiles.count_parts`. All that is drawn is read here once, for the digest that goes into the
    plan.

    Raises:
        ValueError: The parts do not fit into a byte.
    """

    heads, shuffled, portable = 0, False, True

    def __init__(self, files: TruthFiles | BoxFile, names: Sequence[str], *, grid: int):
        if not 1 <= grid <= 256:
            raise ValueError(f"grid must lie between 1 and 256 (ranks are two bytes), got {grid}")
        self.files, self.grid = files, grid
        self.parts = files.count_parts(names)
        if not 1 <= self.parts <= 254:
            raise ValueError(
                f"part ids must lie between 1 and 254 (255 is unknown), the largest in {files.at} is {self.parts}"
            )
        self.sha256 = sha256_json([TRUTH, self.parts, files.digests(names)])

    @property
    def groups(self) -> int:
        """The parts, and the background."""
        return self.parts + 1

    @property
    def computed(self) -> dict[str, str]:
        """Nothing: no encoder looks at an image."""
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the labels, for plans."""
        return {"truth_sha256": self.sha256}

    def describe(self) -> dict[str, Any]:
        """What the labels come from, for dataset.json."""
        return {"truth": str(self.files.at), "parts": self.parts, **self.identity}

    def label(self, batch: Sequence[Stored]) -> Labels:
        """True part of each cell, and its rank in foreground; the confidence is 255: nobody asked.

        Raises:
            ValueError: A map is of another size than its image, smaller than the grid, or has an id that is no part.
        """
        cells = np.stack([self._cells(stored) for stored in batch])
        outside = (cells == 0) | (cells == UNKNOWN)
        return Labels(
            np.where(outside, self.parts, cells - 1).astype(np.uint8),
            np.stack([depth_rank(~one) for one in outside]),
            None,
            None,
            np.full(len(batch), 255, np.uint8),
        )

    def _cells(self, stored: Stored) -> Int[np.ndarray, "grid grid"]:
        """Of the square of the map that was cut from the image."""
        path, ids = self.files.path(stored.source), self.files.read_for(stored.source, stored.source_size)
        x0, y0, x1, y1 = map(int, stored.box)
        wrong = ids[(ids > self.parts) & (ids != UNKNOWN)]
        if wrong.size:
            raise ValueError(f"{path} has the part id {wrong[0]}, but the largest id there is is {self.parts}")
        if min(x1 - x0, y1 - y0) < self.grid:
            raise ValueError(
                f"{stored.source} is smaller than {self.grid} pixels a side, its cells; choose a smaller --grid"
            )
        return cells_of(ids[y0:y1, x0:x1], self.grid)


def truth_beside(source: Source) -> TruthFiles:
    """The part maps beside the images of a folder.

    Raises:
        ValueError: The images come from no local folder.
        FileNotFoundError: An image has no truth.
    """
    folder = Path(source.images_at)
    if not folder.is_dir():
        raise ValueError(
            f"--parts truth needs images from a local folder that holds images/ beside labels/ or masks/, got "
            f"{source.images_at}"
        )
    return TruthFiles(folder, source.names)


def boxes_of(source: Source, file: Path) -> BoxFile:
    """The boxes of images; says of how many others the file has some.

    Raises:
        ValueError, FileNotFoundError: See `BoxFile`.
    """
    boxes = BoxFile(file, source.names)
    if boxes.unused:
        print(
            f"{file} has boxes of {boxes.unused:,} images that are not among these; they are not used", file=sys.stderr
        )
    return boxes


def depth_rank(inside: Bool[np.ndarray, "rows cols"]) -> UInt16[np.ndarray, "rows cols"]:
    """Foreground first, the cell furthest from any background foremost; then the background, the cell nearest to the
    foreground foremost. Distances are Euclidean, between centres of cells; equals go by index.

    Where all is of one kind, what lies beyond the border stands for the other, so that the middle comes first.
    """
    if inside.all() or not inside.any():
        depth = _distance(np.pad(np.ones_like(inside), 1))[1:-1, 1:-1]
    else:
        depth = _distance(inside) - _distance(~inside)
    return reranked(-depth).astype(np.uint16)


def _distance(inside: Bool[np.ndarray, "rows cols"]) -> Float[np.ndarray, "rows cols"]:
    """From a cell inside to the nearest one outside; 0 outside."""
    return np.asarray(ndimage.distance_transform_edt(inside))
