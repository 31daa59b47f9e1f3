"""Batches of images for training: seeded, endless, uint8 squares."""

import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from shards.decode import ImageError
from shards.images import ImageFile, ImageList, read_square
from shards.order import permutation
from shards.rng import VIEW, uniform

BATCHES_AHEAD = 2
_named: set[ImageFile] = set()
"""Unreadable images named on stderr: once a process, however often its batches begin again."""
_telling = threading.Lock()


class ImageBatches:
    """An endless sequence of batches, a pure function of (seed, step): starting at a step gives what followed it.

    Each epoch is a permutation of the images. An image's short side becomes `size`; the square is cut at a
    random place along the long side, keyed by (seed, epoch, index). An unreadable image is named once a
    process on stderr and replaced by the next readable one of the list. Of several ranks, each yields its block of a
    batch of `batch_size` (which they divide). Use as a context manager.
    """

    def __init__(
        self,
        images: ImageList,
        *,
        size: int,
        batch_size: int,
        seed: int,
        step: int = 0,
        threads: int = 2,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.unreadable: dict[int, str] = {}
        self._images = images.images
        self._size, self._batch_size, self._seed, self._step = size, batch_size, seed, step
        self._local, self._first = batch_size // world_size, rank * batch_size // world_size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __iter__(self) -> Iterator[tuple[UInt8[Tensor, "batch height width 3"], Int64[Tensor, " batch"]]]:
        ahead: deque[list[Future[tuple[np.ndarray, int]]]] = deque()
        step = self._step
        while True:
            while len(ahead) < BATCHES_AHEAD:
                ahead.append(self._submit(step))
                step += 1
            images, indices = zip(*(future.result() for future in ahead.popleft()), strict=True)
            yield torch.from_numpy(np.stack(images)), torch.tensor(indices)

    def close(self) -> None:
        """Stop the threads; what was decoded ahead is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "ImageBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, step: int) -> list[Future[tuple[np.ndarray, int]]]:
        first = step * self._batch_size + self._first
        epochs, places = np.divmod(np.arange(first, first + self._local), len(self._images))
        indices = np.array([self._permuted(int(e))[p] for e, p in zip(epochs, places, strict=True)], np.int64)
        offsets = uniform(self._seed, epochs, indices, VIEW, 1)[:, 0]
        return [self._pool.submit(self._read, int(i), float(o)) for i, o in zip(indices, offsets, strict=True)]

    def _permuted(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self._images), seed=self._seed, epoch=epoch))
        return self._order[1]

    def _read(self, index: int, offset: float) -> tuple[np.ndarray, int]:
        count = len(self._images)
        for candidate in ((index + further) % count for further in range(count)):
            if candidate in self.unreadable:
                continue
            try:
                image = read_square(self._images[candidate], self._size, offset=offset).image
            except ImageError as error:
                self._leave_out(candidate, error)
                continue
            return np.array(image), candidate
        raise ValueError(f"none of the {count} images can be read, the first because: {self.unreadable[0]}")

    def _leave_out(self, index: int, error: Exception) -> None:
        image = self._images[index]
        with _telling:
            self.unreadable[index] = str(error)
            if image not in _named:
                _named.add(image)
                print(f"{image.name} cannot be read ({error}); the next image takes its place", file=sys.stderr)
