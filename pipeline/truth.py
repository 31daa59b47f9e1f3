"""Stored labels against pictures whose parts are known: one row a method, shortcuts among them."""

from pathlib import Path
from typing import Any

import numpy as np

from evaluate.part_quality import score, shortcuts
from evaluate.part_scores import background_first
from shards.batches import in_order
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
    """Scores of each shard set of the same pictures, then of the shortcut controls.

    Args:
        truth: Folder with labels/NAME.png (part ids, 0 = background) or masks/NAME.png (0 and 255) beside
            images/NAME.jpg; cut to squares as the pictures were.
    """
    rows = []
    for method, shards in sets.items():
        images, parts, fgrank = _stored(shards)
        files = TruthFiles(truth, shards.sources)
        true = np.stack([_centre_cells(files.read(source), shards.grid) for source in shards.sources])
        scores = score(background_first(parts, shards.groups), fgrank, true, images, shards.groups)
        rows.append({"method": method} | {name: scores[name] for name in SHOWN})
    for control, scores in shortcuts(true, images, shards.groups).items():
        rows.append({"method": control} | {name: scores[name] for name in SHOWN})
    return rows


def _stored(shards: ShardSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batches = list(in_order(shards, batch_size=256))
    return (
        np.concatenate([batch.images for batch in batches]),
        np.concatenate([batch.parts for batch in batches]),
        np.concatenate([batch.fgrank for batch in batches]).astype(np.int64),
    )


def _centre_cells(labels: np.ndarray, grid: int) -> np.ndarray:
    """Of the centre square, as extraction cuts it."""
    side = min(labels.shape)
    y0, x0 = (round((length - side) * 0.5) for length in labels.shape)
    return cells_of(labels[y0 : y0 + side, x0 : x0 + side], grid)
