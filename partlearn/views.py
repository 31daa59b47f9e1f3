"""Pictures as training sees them: seeded batches of uint8 squares, and batched crops and colours of those."""

import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from shards.decode import PictureError, decode_rgb, square
from shards.order import permutation
from shards.pictures import Picture, PictureList, read_bytes
from shards.rng import VIEW, uniform

BATCHES_AHEAD = 2
_named: set[Picture] = set()
"""Unreadable pictures told of on stderr: once a process, however often its batches begin anew."""
_telling = threading.Lock()


class PictureBatches:
    """An endless sequence of batches, a pure function of (seed, step): starting at a step gives what followed it.

    Each epoch is a permutation of the pictures. A picture's short side becomes `size`; the square is cut at a
    random place along the long side, keyed by (seed, epoch, index). An unreadable picture is named once a
    process on stderr and replaced by the next readable one of the list. Of several ranks, each yields its block of a
    batch of `batch_size` (which they divide). Use as a context manager.
    """

    def __init__(
        self,
        pictures: PictureList,
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
        self._pictures = pictures.pictures
        self._size, self._batch_size, self._seed, self._step = size, batch_size, seed, step
        self._local, self._first = batch_size // world_size, rank * batch_size // world_size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
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

    def __enter__(self) -> "PictureBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, step: int) -> list[Future[tuple[np.ndarray, int]]]:
        first = step * self._batch_size + self._first
        epochs, places = np.divmod(np.arange(first, first + self._local), len(self._pictures))
        indices = np.array([self._permuted(int(e))[p] for e, p in zip(epochs, places, strict=True)], np.int64)
        offsets = uniform(self._seed, epochs, indices, VIEW, 1)[:, 0]
        return [self._pool.submit(self._read, int(i), float(o)) for i, o in zip(indices, offsets, strict=True)]

    def _permuted(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self._pictures), seed=self._seed, epoch=epoch))
        return self._order[1]

    def _read(self, index: int, offset: float) -> tuple[np.ndarray, int]:
        count = len(self._pictures)
        for candidate in ((index + further) % count for further in range(count)):
            if candidate in self.unreadable:
                continue
            try:
                image, _ = square(decode_rgb(read_bytes(self._pictures[candidate])), self._size, offset=offset)
            except (PictureError, OSError) as error:
                self._leave_out(candidate, error)
                continue
            return np.array(image), candidate
        raise ValueError(f"none of the {count} pictures can be read, the first because: {self.unreadable[0]}")

    def _leave_out(self, index: int, error: Exception) -> None:
        picture = self._pictures[index]
        with _telling:
            self.unreadable[index] = str(error)
            if picture not in _named:
                _named.add(picture)
                print(f"{picture.name} cannot be read ({error}); the next picture takes its place", file=sys.stderr)


def random_boxes(
    batch: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator,
) -> Float[Tensor, "batch 4"]:
    """Boxes (x0, y0, x1, y1) in unit coordinates, as torchvision's RandomResizedCrop draws them.

    Area uniform in `scale`, aspect log-uniform in `ratio`, place uniform. A side longer than the picture is cut
    to it, where torchvision draws again: no loop, and boxes near the whole picture stay near it.
    """
    area, aspect, left, top = torch.rand(4, batch, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * area
    low, high = torch.tensor(ratio).log()
    aspect = (low + (high - low) * aspect).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x0, y0 = left * (1 - width), top * (1 - height)
    return torch.stack([x0, y0, x0 + width, y0 + height], dim=1)


def crop(
    images: Float[Tensor, "batch channels height width"],
    boxes: Float[Tensor, "batch 4"],
    size: int,
    flip: Bool[Tensor, " batch"],
) -> Float[Tensor, "batch channels size size"]:
    """One box of each picture at `size` pixels, mirrored where `flip`: bilinear samples at the new pixels' centres.

    Bilinear sampling skips pixels where a box shrinks more than twofold; such pictures are halved by averaging
    first, as often as that takes.
    """
    _, _, height, width = images.shape
    x0, y0, x1, y1 = boxes.unbind(1)
    shrink = torch.maximum((x1 - x0) * width, (y1 - y0) * height) / size
    halvings = (shrink.log2().ceil() - 1).clamp(min=0).long()
    sign = 1 - 2 * flip.to(images.dtype)
    zero = torch.zeros_like(x0)
    # Maps the output square [-1, 1]² onto the box, where the picture too is [-1, 1]².
    rows_x = torch.stack([(x1 - x0) * sign, zero, x0 + x1 - 1], dim=1)
    rows_y = torch.stack([zero, y1 - y0, y0 + y1 - 1], dim=1)
    theta = torch.stack([rows_x, rows_y], dim=1)
    cropped = images.new_empty(*images.shape[:2], size, size)
    for level in halvings.unique().tolist():
        chosen = halvings == level
        source = F.avg_pool2d(images[chosen], 2**level) if level else images[chosen]
        where = F.affine_grid(theta[chosen], [*source.shape[:2], size, size], align_corners=False)
        cropped[chosen] = F.grid_sample(source, where, padding_mode="border", align_corners=False)
    return cropped


def jitter_colour(
    images: Float[Tensor, "batch 3 height width"],
    *,
    strength: float,
    generator: torch.Generator,
    rank: int = 0,
    world_size: int = 1,
) -> Float[Tensor, "batch 3 height width"]:
    """Brightness, contrast and saturation of each picture times 1 ± strength, grey with probability 0.2.

    Each picture in [0, 1] draws its own factors; the order is fixed, and values are clamped at the end. The pictures
    are one rank's block of a batch, for the whole of which the factors are drawn.
    """
    mine = slice(rank * len(images), (rank + 1) * len(images))
    draws = torch.rand(4, world_size * len(images), 1, 1, 1, generator=generator)[:, mine].to(images.device)
    brightness, contrast, saturation = 1 + strength * (2 * draws[:3] - 1)
    saturation = torch.where(draws[3] < 0.2, 0.0, saturation)
    bright = images * brightness
    grey = luma(bright)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    # Contrast and saturation are linear and commute: both move a pixel towards a grey.
    return (mean + contrast * (grey + saturation * (bright - grey) - mean)).clamp(0, 1)


def luma(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Grey as ITU-R BT.601 weighs it."""
    return (images * images.new_tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(dim=1, keepdim=True)
