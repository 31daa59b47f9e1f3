"""A batch of random images, labels, ranks and attention, as a stream gives them; the same in every run."""

import numpy as np

from shards.batches import Batch


def drawn_batch(images: int, *, side: int, grid: int, groups: int, heads: int) -> Batch:
    """Images of `side` pixels, labels of `grid` x `grid` cells in `groups` groups, attention of `heads` heads."""
    random, cells = np.random.default_rng(0), (grid, grid)
    ranks = [random.permutation(grid * grid).reshape(cells) for _ in range(images)]
    return Batch(
        images=random.integers(0, 256, (images, side, side, 3), dtype=np.uint8),
        parts=random.integers(0, groups, (images, *cells), dtype=np.uint8),
        fgrank=np.stack(ranks).astype(np.uint16),
        class_ids=np.zeros(images, np.int64),
        indices=np.arange(images),
        epochs=np.zeros(images, np.int64),
        position=0,
        attn=random.integers(0, 256, (images, heads, *cells), dtype=np.uint8),
        attn_peak=random.random((images, heads), dtype=np.float32) / 50,
    )
