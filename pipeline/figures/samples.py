"""The images that a sheet shows."""

import numpy as np

from shards.batches import STORED, Batch, Reader
from shards.order import permutation
from shards.shard_set import ShardSet


def pick(shards: ShardSet, count: int, *, seed: int) -> Batch:
    """The first `count` samples of the seed's order, by index, with attention where there is any."""
    wanted = np.sort(permutation(len(shards), seed=seed, epoch=0)[:count])
    place = (wanted, np.zeros_like(wanted), 0)
    reader = Reader(shards, STORED, attention=shards.peaks is not None, substitutes=0)
    (batch,) = reader.decoded([place], threads=1, prefetch=0)
    return batch
