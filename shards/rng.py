"""Random numbers as arithmetic: pure functions of seed, epoch, index and purpose, the same on every machine.

Counter-based splitmix64 (Steele, Lea and Flood, OOPSLA 2014): NumPy promises its generators' streams only for one
build, and a generator's state would have to be kept, sent and restored.
"""

import hashlib

import numpy as np
from jaxtyping import Float32, Int64, UInt64

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ORDER, FLIP, CROP, MASK, PART_ORDER, VIEW, SHARDS, TIES = range(8)  # purposes: never renumber, draws depend on them
BLOCK, COLOR, HINT, PREDICTED, GUMBEL, RECTANGLE, INIT = range(8, 15)


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
        keys[epochs == epoch] = key_of(seed, int(epoch), purpose)
    rows = splitmix64(keys + (indices.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    columns = np.arange(1, draws + 1, dtype=np.uint64) * GOLDEN
    bits = splitmix64(rows[:, None] + columns[None])
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def splitmix64(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The finaliser of splitmix64: a bijection of 64 bits that leaves no visible order."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(seed: int, epoch: int, purpose: int) -> np.uint64:
    """The tuple hashed, not added: seed 1 must not be seed 0 shifted."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))
