"""Shards as an endless stream of batches, in an order that depends on seed and epoch alone.

Position p counts samples since the start: sample p is the (p mod N)-th of epoch (p div N). A rank takes its
contiguous block of every global batch, so the samples of a step do not depend on how many ranks there are. The
state is p, and nothing else.
"""

import io
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8, UInt16
from PIL import Image

from shards.dataset import ShardSet
from shards.errors import ShardError
from shards.order import permutation

try:
    import simplejpeg
except ImportError:  # a machine with its own stack: Pillow decodes to the same bits, at two thirds of the speed
    simplejpeg = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures and labels of one step of one rank."""

    images: UInt8[np.ndarray, "batch height width 3"]
    parts: UInt8[np.ndarray, "batch rows cols"]
    fgrank: UInt16[np.ndarray, "batch rows cols"]
    class_ids: Int64[np.ndarray, " batch"]
    indices: Int64[np.ndarray, " batch"]
    epochs: Int64[np.ndarray, " batch"]
    position: int
    """Samples that all ranks took before this batch."""


class Stream:
    """Batches from `position` on, for ever; each sample once an epoch, batches may straddle epochs.

    Threads decode ahead into preallocated batches (the decoder releases the GIL); nothing is pickled, and nothing
    is left behind by a kill.

    Raises:
        ValueError: The ranks do not divide the batch.
        ShardError: While iterating: a sample is damaged (shard, key and offset are named).
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
        threads: int = 2,
        prefetch: int = 2,
    ):
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} ranks; choose a multiple")
        self.shards, self.batch_size, self.seed, self.position = shards, batch_size, seed, position
        self.local = batch_size // world_size
        self.first = rank * self.local
        self.threads, self.prefetch = threads, prefetch
        self._orders: dict[int, np.ndarray] = {}

    def __iter__(self) -> Generator[Batch, None, None]:
        position = self.position
        with ThreadPoolExecutor(self.threads, thread_name_prefix="stream") as pool:
            ahead: deque[tuple[Batch, list[Future[None]]]] = deque()
            try:
                while True:
                    while len(ahead) <= self.prefetch:
                        ahead.append(_submit(pool, self.shards, *self._place(position), position, self.threads))
                        position += self.batch_size
                    yield _ready(*ahead.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _place(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and epochs of this rank's samples at a position."""
        places = np.arange(position + self.first, position + self.first + self.local)
        epochs, offsets = np.divmod(places, len(self.shards))
        indices = np.empty(self.local, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order(int(epoch))[offsets[here]]
        return indices, epochs

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = permutation(len(self.shards), seed=self.seed, epoch=epoch)
        return self._orders[epoch]


def in_order(shards: ShardSet, *, batch_size: int, threads: int = 2) -> Iterator[Batch]:
    """Every sample once, by index; the last batch may be short."""
    with ThreadPoolExecutor(threads, thread_name_prefix="stream") as pool:
        for start in range(0, len(shards), batch_size):
            indices = np.arange(start, min(start + batch_size, len(shards)))
            yield _ready(*_submit(pool, shards, indices, np.zeros_like(indices), start, threads))


def decode_jpeg_into(jpeg: bytes, row: UInt8[np.ndarray, "height width 3"]) -> None:
    """Decode a JPEG into `row`; ValueError when it is broken or of another size."""
    if simplejpeg is None:
        with Image.open(io.BytesIO(jpeg)) as image:
            pixels = np.asarray(image.convert("RGB"))
    else:
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
        if (height, width) == row.shape[:2]:
            simplejpeg.decode_jpeg(jpeg, buffer=row)
            return
        pixels = np.empty((int(height), int(width), 3), np.uint8)
    if pixels.shape != row.shape:
        raise ValueError(f"the picture is {pixels.shape[1]}x{pixels.shape[0]}, expected {row.shape[1]}x{row.shape[0]}")
    row[:] = pixels


def _submit(
    pool: ThreadPoolExecutor,
    shards: ShardSet,
    indices: np.ndarray,
    epochs: np.ndarray,
    position: int,
    threads: int,
) -> tuple[Batch, list[Future[None]]]:
    """An empty batch, and the tasks that fill it: a slice of its rows for each thread."""
    count, grid = len(indices), shards.grid
    batch = Batch(
        images=np.empty((count, shards.size, shards.size, 3), np.uint8),
        parts=np.empty((count, grid, grid), np.uint8),
        fgrank=np.empty((count, grid, grid), np.uint16),
        class_ids=shards.class_ids[indices],
        indices=indices,
        epochs=epochs,
        position=position,
    )
    slices = [range(first, count, threads) for first in range(min(threads, count))]
    return batch, [pool.submit(_fill, batch, rows, shards) for rows in slices]


def _fill(batch: Batch, rows: range, shards: ShardSet) -> None:
    for row in rows:
        sample = shards.read(int(batch.indices[row]))
        batch.parts[row], batch.fgrank[row] = sample.parts, sample.fgrank
        try:
            decode_jpeg_into(sample.jpeg, batch.images[row])
        except (ValueError, OSError) as error:
            raise ShardError(f"the picture {sample.key} of {shards.path} cannot be decoded: {error}") from error


def _ready(batch: Batch, tasks: list[Future[None]]) -> Batch:
    for task in tasks:
        task.result()
    return batch
