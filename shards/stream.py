"""Shards as an endless stream of batches, in an order that depends on seed and epoch alone.

Position p counts samples since the start: sample p is the (p mod N)-th of epoch (p div N). A rank takes its
contiguous block of every global batch, so the samples of a step do not depend on how many ranks there are. The
state is p, and nothing else.
"""

import io
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
from jaxtyping import Int64, UInt8, UInt16
from PIL import Image

from shards.dataset import ShardSet
from shards.errors import ShardError
from shards.order import Epochs

try:
    import simplejpeg
except ImportError:  # a machine with its own stack: Pillow decodes to the same bits, at two thirds of the speed
    simplejpeg = None

Place = tuple[np.ndarray, np.ndarray, int]
"""Indices, epochs and position of a batch to be."""


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
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} ranks; choose a multiple")
        self.shards, self.batch_size, self.position = shards, batch_size, position
        self.local = batch_size // world_size
        self.first = rank * self.local
        self.threads, self.prefetch = threads, prefetch
        self._epochs = Epochs(len(shards), seed=seed)

    def __iter__(self) -> Generator[Batch, None, None]:
        return _decoded(self.shards, self._places(), threads=self.threads, prefetch=self.prefetch)

    def _places(self) -> Iterator[Place]:
        """This rank's block of every global batch."""
        for position in count(self.position, self.batch_size):
            block = np.arange(position + self.first, position + self.first + self.local)
            yield *self._epochs.at(block), position


def in_order(shards: ShardSet, *, batch_size: int, threads: int = 2) -> Generator[Batch, None, None]:
    """Every sample once, by index; the last batch may be short."""
    blocks = (np.arange(start, min(start + batch_size, len(shards))) for start in range(0, len(shards), batch_size))
    places = ((block, np.zeros_like(block), int(block[0])) for block in blocks)
    return _decoded(shards, places, threads=threads, prefetch=1)


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


def _decoded(shards: ShardSet, places: Iterable[Place], *, threads: int, prefetch: int) -> Generator[Batch, None, None]:
    """The batches at `places`; `prefetch` further ones are decoded meanwhile."""
    ahead: deque[tuple[Batch, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="stream") as pool:
        try:
            for place in places:
                ahead.append(_submit(pool, shards, place, threads))
                if len(ahead) > prefetch:
                    yield _ready(*ahead.popleft())
            while ahead:
                yield _ready(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, shards: ShardSet, place: Place, threads: int) -> tuple[Batch, list[Future[None]]]:
    """An empty batch, and the tasks that fill it: a slice of its rows for each thread."""
    indices, epochs, position = place
    rows, grid = len(indices), shards.grid
    batch = Batch(
        images=np.empty((rows, shards.size, shards.size, 3), np.uint8),
        parts=np.empty((rows, grid, grid), np.uint8),
        fgrank=np.empty((rows, grid, grid), np.uint16),
        class_ids=shards.class_ids[indices],
        indices=indices,
        epochs=epochs,
        position=position,
    )
    slices = [range(first, rows, threads) for first in range(min(threads, rows))]
    return batch, [pool.submit(_fill, batch, slice_, shards) for slice_ in slices]


def _fill(batch: Batch, rows: range, shards: ShardSet) -> None:
    for row in rows:
        index = int(batch.indices[row])
        try:
            sample = shards.read(index)
            decode_jpeg_into(sample.jpeg, batch.images[row])
        except (ValueError, OSError) as error:
            raise ShardError(f"{shards.where(index)} cannot be read: {error}") from error
        batch.parts[row], batch.fgrank[row] = sample.parts, sample.fgrank


def _ready(batch: Batch, tasks: list[Future[None]]) -> Batch:
    for task in tasks:
        task.result()
    return batch
