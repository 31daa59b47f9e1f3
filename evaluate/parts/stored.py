"""Stored labels against images whose parts are known: one row a method, shortcuts among them."""

from pathlib import Path
from typing import Any

import numpy as np

from evaluate.parts.metrics import score, shortcuts
from evaluate.parts.score import background_first
from shards.batches import in_order
from shards.index import BOX, read_column
from shards.shard_set import ShardSet
from shards.truth import TruthFiles, cells_of

SHOWN = (
    "foreground_ap",
    "foreground_recall_quarter",
    "nmi",
    "ari",
    "beyond_shortcut",
    "colour_nmi",
    "bands_nmi",
    "parts_used",
)


def score_against_truth(sets: dict[str, ShardSet], *, truth: Path) -> list[dict[str, Any]]:
    """Scores of each shard set of the same images, then of the shortcut controls.

    Args:
        truth: Folder with labels/NAME.png (part ids, 0 = background) or masks/NAME.png (0 and 255) beside
            images/NAME.jpg; cut to squares as the images were.

    Raises:
        FileNotFoundError, ValueError: An image has no truth, or one of another size.
    """
    rows = []
    for method, shards in sets.items():
        images, parts, fgrank = _stored(shards)
        true, groups = _true_cells(shards, truth), 1 + shards.num_parts
        scores = score(background_first(parts, groups), fgrank, true, images, groups)
        rows.append({"method": method} | {name: scores[name] for name in SHOWN})
    for control, scores in shortcuts(true, images, groups).items():
        rows.append({"method": control} | {name: scores[name] for name in SHOWN})
    return rows


def _stored(shards: ShardSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batches = list(in_order(shards, batch_size=256))
    return (
        np.concatenate([batch.images for batch in batches]),
        np.concatenate([batch.parts for batch in batches]),
        np.concatenate([batch.fgrank for batch in batches]).astype(np.int64),
    )


def _true_cells(shards: ShardSet, truth: Path) -> np.ndarray:
    """Of the squares that were cut from the images."""
    files, index = TruthFiles(truth, shards.sources), shards.path / "index.parquet"
    sizes = zip(*(read_column(index, side) for side in ("src_width", "src_height")), strict=True)
    boxes = zip(*(map(int, read_column(index, side)) for side in BOX), strict=True)
    return np.stack(
        [
            cells_of(files.read_for(source, size)[y0:y1, x0:x1], shards.grid)
            for source, size, (x0, y0, x1, y1) in zip(shards.sources, sizes, boxes, strict=True)
        ]
    )
