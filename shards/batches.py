"""Batches filled from shards on threads: images decoded in place, labels beside them, both altered together."""

import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt16

from shards.crops import crop_cells, crop_into, reranked, sample_boxes, sample_flips
from shards.decode import decode_jpeg_into, decode_mirrored_into, memory_for, pixels_in
from shards.errors import SampleError, ShardError
from shards.sample import Sample, attention_of
from shards.shard_set import ShardSet

HOPS = 8
MOST_KEPT = 8
UNHELD = 3
"""References to an array that only the list of kept ones has: the list's, the loop's and the question's own."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images and labels of one step of one rank."""

    images: UInt8[np.ndarray, "batch height width 3"]
    parts: UInt8[np.ndarray, "batch rows cols"]
    fgrank: UInt16[np.ndarray, "batch rows cols"]
    class_ids: Int64[np.ndarray, " batch"]
    indices: Int64[np.ndarray, " batch"]
    epochs: Int64[np.ndarray, " batch"]
    position: int
    """Samples that all ranks took before this batch."""
    attn: UInt8[np.ndarray, "batch heads rows cols"] | None = None
    """Class attention of each head as it is stored, where the stream was asked for it."""
    attn_peak: Float32[np.ndarray, "batch heads"] | None = None
    """What 255 stands for in each head."""

    @property
    def attention(self) -> Float32[np.ndarray, "batch heads rows cols"]:
        """The encoder's class attention, where the stream was asked for it; heads can be compared."""
        assert self.attn is not None
        assert self.attn_peak is not None
        return attention_of(self.attn, self.attn_peak)


@dataclass(frozen=True, slots=True)
class Augment:
    """How an image and its labels are altered together; every draw is keyed by (seed, epoch, image)."""

    flip: bool = False
    """Mirror every other image."""
    crop_scale: float = 1.0
    """Least share of the area that a random resized crop keeps; 1 = no crop."""
    seed: int = 0

    def sample(
        self, epochs: Int64[np.ndarray, " batch"], indices: Int64[np.ndarray, " batch"], *, size: int
    ) -> "AugmentParams":
        """What is done to each image of a batch."""
        crops = self.crop_scale < 1
        return AugmentParams(
            sample_flips(self.seed, epochs, indices) if self.flip else None,
            sample_boxes(self.seed, epochs, indices, size=size, scale=self.crop_scale) if crops else None,
        )


@dataclass(frozen=True, slots=True)
class AugmentParams:
    """Which images of a batch are mirrored, and the box (x0, y0, width, height) that is kept of each."""

    flips: Bool[np.ndarray, " batch"] | None
    boxes: Int64[np.ndarray, "batch 4"] | None


STORED = Augment()
"""Images and labels as they are stored."""


Place = tuple[np.ndarray, np.ndarray, int]
"""Indices, epochs and position of a batch to be."""


@dataclass(slots=True)
class Reader:
    """Fills batches from shards, on threads."""

    shards: ShardSet
    augment: Augment
    attention: bool
    substitutes: int
    damaged: set[int] = field(default_factory=set)
    """Samples found damaged so far, by this rank."""
    _kept: list[np.ndarray] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def decoded(self, places: Iterable[Place], *, threads: int, prefetch: int) -> Generator[Batch, None, None]:
        """The batches at `places`; `prefetch` further ones are decoded meanwhile."""
        ahead: deque[tuple[Batch, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="stream") as pool:
            try:
                for place in places:
                    ahead.append(self._submit(pool, place, threads))
                    if len(ahead) > prefetch:
                        yield _ready(*ahead.popleft())
                while ahead:
                    yield _ready(*ahead.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, place: Place, threads: int) -> tuple[Batch, list[Future[None]]]:
        """An empty batch, and the tasks that fill it: a slice of its rows for each thread."""
        indices, epochs, position = place
        shards, rows = self.shards, len(indices)
        square = (shards.grid, shards.grid)
        batch = Batch(
            images=self._pixels(rows),
            parts=np.empty((rows, *square), np.uint8),
            fgrank=np.empty((rows, *square), np.uint16),
            class_ids=np.empty(rows, np.int64),
            indices=indices,
            epochs=epochs,
            position=position,
            attn=np.empty((rows, shards.heads, *square), np.uint8) if self.attention else None,
            attn_peak=np.empty((rows, shards.heads), np.float32) if self.attention else None,
        )
        params = self.augment.sample(epochs, indices, size=shards.size)
        slices = [range(first, rows, threads) for first in range(min(threads, rows))]
        return batch, [pool.submit(self._fill, batch, params, slice_) for slice_ in slices]

    def _pixels(self, rows: int) -> UInt8[np.ndarray, "rows height width 3"]:
        """Room for images: that of an earlier batch, when nobody holds it, or its views and tensors, any more.

        Fresh memory is zeroed by the kernel first, which costs a tenth of the decoding.
        """
        shape = (rows, self.shards.size, self.shards.size, 3)
        room = memory_for(*shape)
        for kept in self._kept:
            if len(kept) == len(room) and sys.getrefcount(kept) == UNHELD:
                return pixels_in(kept, *shape)
        self._kept = [*self._kept, room][-MOST_KEPT:]
        return pixels_in(room, *shape)

    def _fill(self, batch: Batch, params: AugmentParams, rows: range) -> None:
        shape = (2, *batch.images.shape[1:])
        scratch = pixels_in(memory_for(*shape), *shape)
        for row in rows:
            self._read_into(batch, row, params, scratch)

    def _read_into(self, batch: Batch, row: int, params: AugmentParams, scratch: np.ndarray) -> None:
        """One image and its labels; or its neighbour's, where that is allowed and it is damaged."""
        wanted = int(batch.indices[row])
        for hop in range(HOPS if self.substitutes else 1):
            index = (wanted + hop) % len(self.shards)
            try:
                sample = self.shards.read(index, attention=self.attention)
                try:
                    _place(sample, batch, row, params, scratch)
                except (ValueError, OSError) as error:
                    raise self.shards.damaged(index, str(error)) from error
            except SampleError as error:
                self._count(index, error)
            except OSError as error:
                raise self.shards.damaged(index, f"cannot be read: {error}") from error
            else:
                return
        raise ShardError(
            f"the {HOPS} samples from index {wanted} on are all damaged; run `verify` on {self.shards.path}"
        )

    def _count(self, damaged: int, error: SampleError) -> None:
        """Tell of a damaged sample once, and stop where there are too many."""
        with self._lock:
            if damaged not in self.damaged:
                self.damaged.add(damaged)
                if self.substitutes and len(self.damaged) <= self.substitutes:
                    print(
                        f"{error}; its neighbour stands in ({len(self.damaged)} of {self.substitutes})",
                        file=sys.stderr,
                    )
            if len(self.damaged) > self.substitutes:
                raise error


def _place(
    sample: Sample, batch: Batch, row: int, params: AugmentParams, scratch: UInt8[np.ndarray, "2 height width 3"]
) -> None:
    """Decode a sample into its row; mirrored and cropped where that was drawn."""
    flip = params.flips is not None and bool(params.flips[row])
    image, size = batch.images[row], batch.images.shape[1]
    whole = image if params.boxes is None else scratch[0]
    if flip:
        decode_mirrored_into(sample.jpeg, whole, scratch[1])
    else:
        decode_jpeg_into(sample.jpeg, whole)
    labels = {"parts": sample.parts, "fgrank": sample.fgrank}
    if sample.attn is not None:
        labels["attn"] = sample.attn
    if params.boxes is not None:
        x0, y0, width, height = params.boxes[row].tolist()
        crop_into(whole, (size - x0 - width if flip else x0, y0, width, height), image)
        labels = {name: crop_cells(cells, (x0, y0, width, height), size=size) for name, cells in labels.items()}
        labels["fgrank"] = reranked(labels["fgrank"])
    for name, cells in labels.items():
        getattr(batch, name)[row] = cells[..., ::-1] if flip else cells
    if batch.attn_peak is not None:
        batch.attn_peak[row] = sample.attn_peak
    batch.class_ids[row] = sample.class_id


def _ready(batch: Batch, tasks: list[Future[None]]) -> Batch:
    for task in tasks:
        task.result()
    return batch


def in_order(shards: ShardSet, *, batch_size: int, threads: int = 2) -> Generator[Batch, None, None]:
    """Every sample once, by index; the last batch may be short."""
    blocks = (np.arange(start, min(start + batch_size, len(shards))) for start in range(0, len(shards), batch_size))
    places = ((block, np.zeros_like(block), int(block[0])) for block in blocks)
    return Reader(shards, STORED, False, 0).decoded(places, threads=threads, prefetch=1)
