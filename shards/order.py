"""Order and random numbers as arithmetic: pure functions of seed, epoch and index, the same on every machine.

Counter-based splitmix64 (Steele, Lea and Flood, OOPSLA 2014): NumPy promises its generators' streams only for one
build, and a generator's state would have to be kept, sent and restored.
"""

import hashlib
from collections.abc import Iterator
from itertools import count as count_from

import numpy as np
from jaxtyping import Float32, Int64, UInt64

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ORDER, FLIP, CROP, MASK, PART_ORDER, VIEW, SHARDS = range(7)  # purposes: never renumber, draws depend on them


def permutation(count: int, *, seed: int, epoch: int, purpose: int = ORDER) -> Int64[np.ndarray, " count"]:
    """The order of an epoch: indices sorted by a hash of (seed, epoch, index). 0.1 s for ImageNet."""
    counters = np.arange(1, count + 1, dtype=np.uint64)
    return np.argsort(splitmix64(_key(seed, epoch, purpose) + counters * GOLDEN), kind="stable")


class Epochs:
    """The endless concatenation of epochs over a set: which sample lies at a position.

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


def uniform(
    seed: int,
    epochs: Int64[np.ndarray, " batch"],
    indices: Int64[np.ndarray, " batch"],
    purpose: int,
    draws: int,
) -> Float32[np.ndarray, "batch draws"]:
    """Numbers in [0, 1), 24 bits each, keyed by (seed, epoch, index, purpose, draw)."""
    keys = np.empty(len(indices), dtype=np.uint64)
    for epoch in np.unique(epochs):
        keys[epochs == epoch] = _key(seed, int(epoch), purpose)
    rows = splitmix64(keys + (indices.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    columns = np.arange(1, draws + 1, dtype=np.uint64) * GOLDEN
    bits = splitmix64(rows[:, None] + columns[None])
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def splitmix64(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The finaliser of splitmix64: a bijection of 64 bits that leaves no visible order."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, epoch: int, purpose: int) -> np.uint64:
    """The tuple hashed, not added: seed 1 must not be seed 0 shifted."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))
