"""What extraction reads: images as people have them, or those of a finished shard set."""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from shards import storage
from shards.decode import Box, ImageError
from shards.images import ImageFile, ImageList, list_images, read_square
from shards.index import BOX, load_rows
from shards.info import read_info
from shards.order import permutation
from shards.sample import Rejected
from shards.shard_set import ShardSet
from shards.writer import shard_paths


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as the shard holds it, and its pixels as any reader decodes them."""

    key: str
    source: str
    class_id: int
    jpeg: bytes
    """Empty where another set holds it."""
    pixels: np.ndarray
    source_size: tuple[int, int]
    box: Box


Load = Callable[[], Stored | Rejected]


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Image files, to be squared and encoded."""

    number: int
    first: int
    """Ordinal of the first file among all inputs, in the order in which shards hold them."""
    files: tuple[ImageFile, ...]
    size: int
    quality: int

    def loads(self) -> list[Load]:
        """Its images in order, each to be loaded by whatever thread has time."""
        return [partial(self._load, self.first + place, file) for place, file in enumerate(self.files)]

    def _load(self, ordinal: int, file: ImageFile) -> Stored | Rejected:
        """Decode, square, and encode as the shard will hold it; or the reason why not."""
        try:
            cropped, box, source_size = read_square(file, self.size)
        except ImageError as error:
            return Rejected(source=file.name, ordinal=ordinal, step=error.step, reason=str(error))
        buffer = io.BytesIO()
        cropped.save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
        jpeg = buffer.getvalue()
        return Stored(f"{ordinal:08d}", file.name, file.class_id, jpeg, _pixels(jpeg), source_size, box)


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """The images of one shard of a finished set."""

    number: int
    path: Path

    def loads(self) -> list[Load]:
        index = shard_paths(self.path, self.number)[1]
        shards = ShardSet(self.path, read_info(self.path), load_rows(index, shard=self.number), None)
        rows = pq.read_table(index).to_pylist()
        return [partial(_load_stored, shards, place, row) for place, row in enumerate(rows)]


Slice = FileSlice | ShardSlice
"""What one shard owns of a source: small enough to be sent to whoever builds the shard."""


class FromImages:
    """The seeded permutation of a list of images, squared and encoded.

    Like `FromShards` it has `size` (side of the stored images in pixels), `classes`, `inputs` (name, digest and
    count, for the plan and dataset.json), `shard_sizes` (inputs of each shard), `slice(number)`, what a shard owns;
    `left_out`, what else was met there, in words; `names` of all images, and `images_at`, where those are files.
    """

    def __init__(self, images: ImageList, *, size: int, quality: int, samples_per_shard: int, seed: int):
        self.images, self.size, self.quality = images.images, size, quality
        self.classes, self.left_out = images.classes, images.left_out_in_words
        self.images_at = _absolute(images.source)
        self.inputs: dict[str, Any] = {
            "source": self.images_at,
            "list_sha256": images.digest,
            "count": len(images.images),
        }
        starts = range(0, len(self.images), samples_per_shard)
        self.shard_sizes = [min(samples_per_shard, len(self.images) - start) for start in starts]
        self._per_shard = samples_per_shard
        self._order = permutation(len(self.images), seed=seed, epoch=0)

    @property
    def names(self) -> list[str]:
        return [image.name for image in self.images]

    def slice(self, number: int) -> FileSlice:
        first = number * self._per_shard
        slots = range(first, first + self.shard_sizes[number])
        files = tuple(self.images[int(self._order[slot])] for slot in slots)
        return FileSlice(number, first, files, self.size, self.quality)


class FromShards:
    """The images of a shard set in its own shards, for a label set that is over them."""

    def __init__(self, path: Path):
        self._shards = ShardSet.open(path)
        self._shards.refuse_labels_alone()
        info = self._shards.info
        self.size, self.classes, self.left_out = self._shards.size, self._shards.classes, ""
        self.inputs: dict[str, Any] = {
            "source": _absolute(str(path)),
            "list_sha256": self._shards.fingerprint,
            "count": len(self._shards),
        }
        self.shard_sizes = [shard["samples"] for shard in info["shards"]]
        self.images_at = str(info["inputs"].get("source", path))

    @property
    def names(self) -> list[str]:
        return self._shards.sources

    def slice(self, number: int) -> ShardSlice:
        return ShardSlice(number, self._shards.path)


Source = FromImages | FromShards


def _load_stored(shards: ShardSet, place: int, row: dict[str, Any]) -> Stored:
    """A damaged image raises SampleError: its labels may not go missing."""
    sample = shards.read(place)
    x0, y0, x1, y1 = (row[side] for side in BOX)
    source_size = (row["src_width"], row["src_height"])
    pixels = _pixels(sample.jpeg)
    return Stored(sample.key, row["source"], sample.class_id, b"", pixels, source_size, (x0, y0, x1, y1))


def _absolute(source: str) -> str:
    """One spelling of a path, which a folder's plan keeps."""
    return source if storage.is_remote(source) else os.path.abspath(source)  # noqa: PTH100 (pathlib leaves .. in it)


def _pixels(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image)


def open_source(
    images: str | None, relabel: Path | None, *, size: int, quality: int, samples_per_shard: int, seed: int
) -> Source:
    """The images in `images`, or those of the shard set `relabel`.

    Raises:
        FileNotFoundError, ValueError, ShardError: There are none (see `list_images` and `ShardSet.open`).
    """
    if relabel is not None:
        return FromShards(relabel)
    return FromImages(
        list_images(images or ""), size=size, quality=quality, samples_per_shard=samples_per_shard, seed=seed
    )
