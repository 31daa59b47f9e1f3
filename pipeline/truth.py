"""Stored labels against pictures whose parts are known: one row a method, shortcuts among them."""

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from evaluate.part_quality import cells_of, score, shortcuts
from evaluate.part_scores import background_first
from shards.batches import in_order
from shards.pictures import square
from shards.shard_set import ShardSet

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
        true = np.stack([_true_cells(truth, source, shards) for source in shards.sources])
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


def _true_cells(truth: Path, source: str, shards: ShardSet) -> np.ndarray:
    name = PurePosixPath(source).with_suffix(".png")
    only_masks = not (truth / "labels").is_dir()
    with Image.open(truth / ("masks" if only_masks else "labels") / name) as labels:
        cut, _ = square(labels, min(labels.size))
    pixels = np.asarray(cut)
    return cells_of((pixels > 127).astype(np.uint8) if only_masks else pixels, shards.grid)
