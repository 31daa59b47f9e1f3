"""The order of samples as arithmetic: a pure function of seed and epoch, the same on every machine."""

from collections.abc import Iterator
from itertools import count as count_from

import numpy as np
from jaxtyping import Int64

from shards.rng import GOLDEN, ORDER, SHARDS, key_of, splitmix64


def permutation(count: int, *, seed: int, epoch: int, purpose: int = ORDER) -> Int64[np.ndarray, " count"]:
    """The order of an epoch: indices sorted by a hash of (seed, epoch, index). 0.1 s for ImageNet."""
    counters = np.arange(1, count + 1, dtype=np.uint64)
    return np.argsort(splitmix64(key_of(seed, epoch, purpose) + counters * GOLDEN), kind="stable")


class Epochs:
    """The endless concatenation of epochs over a set: which sample is at a position.

    With `window` = 0 an epoch is one permutation of all samples. With `window` = R its shards are permuted, cut into
    windows of R, and the samples permuted within each window: R shards are read at a time, for slow or remote disks.
    """

    def __init__(self, shard_sizes: Int64[np.ndarray, " shards"], *, seed: int, window: int = 0):
        self.sizes, self.count, self.seed, self.window = shard_sizes, int(shard_sizes.sum()), seed, window
        self.name = f"window:{window}/v1" if window else "global/v1"
        self._orders: dict[int, np.ndarray] = {}

    def at(
        self, positions: Int64[np.ndarray, " batch"]
    ) -> tuple[Int64[np.ndarray, " batch"], Int64[np.ndarray, " batch"]]:
        """Index and epoch of the samples at `positions`."""
        epochs, places = np.divmod(positions, self.count)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order(int(epoch))[places[here]]
        return indices, epochs

    def windows(self, position: int) -> Iterator[tuple[int, Int64[np.ndarray, " together"]]]:
        """For ever from `position` on: the shards read together, and the position at which they are done with."""
        for epoch in count_from(position // self.count):
            end = epoch * self.count
            for shards in self._windows(epoch):
                end += int(self.sizes[shards].sum())
                if end > position:
                    yield end, shards

    def _windows(self, epoch: int) -> list[np.ndarray]:
        if not self.window:
            return [np.arange(len(self.sizes))]
        shards = permutation(len(self.sizes), seed=self.seed, epoch=epoch, purpose=SHARDS)
        return [shards[first : first + self.window] for first in range(0, len(shards), self.window)]

    def _order(self, epoch: int) -> np.ndarray:
        """A batch may straddle two epochs, so two orders are kept."""
        if epoch not in self._orders:
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = self._computed(epoch).astype(np.uint32)
        return self._orders[epoch]

    def _computed(self, epoch: int) -> np.ndarray:
        shuffled = permutation(self.count, seed=self.seed, epoch=epoch)
        if not self.window:
            return shuffled
        turn = np.empty(len(self.sizes), np.uint32)
        for place, shards in enumerate(self._windows(epoch)):
            turn[shards] = place
        return shuffled[np.argsort(np.repeat(turn, self.sizes)[shuffled], kind="stable")]
