"""Shards as an endless stream of batches, in an order that depends on seed and epoch alone.

Position p counts samples since the start: sample p is the (p mod N)-th of epoch (p div N). A rank takes its
contiguous block of every global batch, so the samples of a step do not depend on how many ranks there are. The
state is p, with the names of what it is a position in.
"""

from collections.abc import Generator, Iterator
from itertools import count
from typing import Any

import numpy as np

from shards.batches import STORED, Augment, Batch, Place, Reader
from shards.decode import assert_decoders_agree
from shards.order import Epochs
from shards.shard_set import ShardSet

STATE_VERSION = 1


class Stream:
    """Batches from `position` on, for ever; each sample once an epoch, batches may straddle epochs.

    Threads decode ahead into preallocated batches (the decoder releases the GIL); nothing is pickled, and nothing
    is left behind by a kill.

    Args:
        window: Shards shuffled together; 0 = all of them. Small windows suit slow or remote disks.
        flip, crop_scale: See `Augment`.
        attention: Give the stored class attention too.
        substitutes: Damaged samples that a rank may replace by their neighbours, each told on stderr, before the
            stream stops; 0 stops at the first.

    Raises:
        ValueError: The ranks do not divide the batch, there are no images or no attention to give, or a cache is
            too small for the window.
        ShardError: A shard is missing; while iterating: a sample is damaged (shard, key and offset are named).
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        batch_size: int,
        seed: int,
        window: int = 0,
        flip: bool = False,
        crop_scale: float = 1.0,
        attention: bool = False,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
        threads: int = 2,
        prefetch: int = 2,
        substitutes: int = 0,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} ranks; choose a multiple")
        if attention:
            shards.refuse_no_attention()
        assert_decoders_agree()
        shards.refuse_labels_alone()
        shards.refuse_missing()
        self.shards, self.batch_size, self.seed, self.position = shards, batch_size, seed, position
        self.local = batch_size // world_size
        self.first = rank * self.local
        self.threads, self.prefetch = threads, prefetch
        self._reader = Reader(shards, Augment(flip, crop_scale, seed), attention, substitutes)
        self._epochs = Epochs(shards.shard_sizes, seed=seed, window=window)

    def state(self, position: int) -> dict[str, Any]:
        """Where a run is that has used the samples before `position`: the same on every rank."""
        return {
            "version": STATE_VERSION,
            "position": position,
            "seed": self.seed,
            "order": self._epochs.name,
            "fingerprint": self.shards.identity,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks.

        Raises:
            ValueError: It was taken from other shards, labels, seed or order.
        """
        ours = self.state(state.get("position", 0))
        differing = [
            f"{name} was {state.get(name)}, now {ours[name]}" for name in ours if state.get(name) != ours[name]
        ]
        if differing:
            raise ValueError(
                f"this run was fed by another stream ({'; '.join(differing)}); give it the same --data, --labels, "
                "--seed and --window, or choose another --out"
            )
        self.position = state["position"]

    def __iter__(self) -> Generator[Batch, None, None]:
        cache = self.shards.cache
        if cache:
            under_way = (self.prefetch + 1) * self.batch_size
            cache.follow(self._epochs.windows(self.position), window=self._epochs.window, under_way=under_way)
        batches = self._reader.decoded(self._places(), threads=self.threads, prefetch=self.prefetch)
        try:
            for batch in batches:
                self.shards.reached(batch.position)
                yield batch
        finally:
            batches.close()
            if cache:
                cache.close()

    def stored(self, count: int, *, epoch: int = 0) -> Batch:
        """The first `count` samples of the run (all of a smaller set), by index, as they are stored: the same at any
        time and on any rank, and nothing of the stream moves.

        Args:
            epoch: The one that the batch says it is of, which keys what is drawn for its masks.
        """
        indices = np.sort(self._epochs.at(np.arange(min(count, len(self.shards))))[0])
        ours = self._reader
        reader = Reader(self.shards, STORED, ours.attention, ours.substitutes, ours.damaged)
        place = (indices, np.full_like(indices, epoch), 0)
        (batch,) = reader.decoded([place], threads=self.threads, prefetch=0)
        return batch

    def _places(self) -> Iterator[Place]:
        """This rank's block of every global batch."""
        for position in count(self.position, self.batch_size):
            block = np.arange(position + self.first, position + self.first + self.local)
            yield *self._epochs.at(block), position
