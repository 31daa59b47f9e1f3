"""What extraction reads: pictures as people have them, or those of a finished shard set."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from shards import storage
from shards.decode import Box, PictureError, decode_rgb, square
from shards.images import Picture, PictureList, list_pictures, read_bytes
from shards.index import BOX
from shards.order import permutation
from shards.sample import Rejected
from shards.shard_set import ShardSet
from shards.writer import shard_paths


@dataclass(frozen=True, slots=True)
class Stored:
    """A picture as the shard holds it, and its pixels as any reader decodes them."""

    key: str
    source: str
    class_id: int
    jpeg: bytes
    """Empty where another set holds it."""
    pixels: np.ndarray
    source_size: tuple[int, int]
    box: Box


Load = Callable[[], Stored | Rejected]


class FromPictures:
    """The seeded permutation of a list of pictures, squared and encoded anew.

    Like `FromShards` it has `size` (side of the stored pictures in pixels), `classes`, `inputs` (name, digest and
    count, for the plan and dataset.json), `shard_sizes` (inputs of each shard), `slice(number)`: what the shard owns,
    each to be loaded by whatever thread has time; `names` of all pictures, and `pictures_at`, where those are files.
    """

    def __init__(self, pictures: PictureList, *, size: int, quality: int, samples_per_shard: int, seed: int):
        self.pictures, self.size, self.quality = pictures.pictures, size, quality
        self.classes = pictures.classes
        self.pictures_at = _absolute(pictures.source)
        self.inputs: dict[str, Any] = {
            "source": self.pictures_at,
            "list_sha256": pictures.digest,
            "count": len(pictures.pictures),
        }
        starts = range(0, len(self.pictures), samples_per_shard)
        self.shard_sizes = [min(samples_per_shard, len(self.pictures) - start) for start in starts]
        self._per_shard = samples_per_shard
        self._order = permutation(len(self.pictures), seed=seed, epoch=0)

    @property
    def names(self) -> list[str]:
        return [picture.name for picture in self.pictures]

    def slice(self, number: int) -> list[Load]:
        first = number * self._per_shard
        slots = range(first, first + self.shard_sizes[number])
        return [partial(self._load, slot, self.pictures[int(self._order[slot])]) for slot in slots]

    def _load(self, ordinal: int, picture: Picture) -> Stored | Rejected:
        """Decode, square, and encode as the shard will hold it; or the reason why not."""
        try:
            data = read_bytes(picture)
        except OSError as error:
            return Rejected(source=picture.name, ordinal=ordinal, stage="read", reason=str(error))
        try:
            image = decode_rgb(data)
        except PictureError as error:
            return Rejected(source=picture.name, ordinal=ordinal, stage="decode", reason=str(error))
        cropped, box = square(image, self.size)
        buffer = io.BytesIO()
        cropped.save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
        jpeg = buffer.getvalue()
        return Stored(f"{ordinal:08d}", picture.name, picture.class_id, jpeg, _pixels(jpeg), image.size, box)


class FromShards:
    """The pictures of a shard set in its own shards, for a label set that lies over them."""

    def __init__(self, path: Path):
        self._shards = ShardSet.open(path)
        self._shards.refuse_labels_alone()
        info = self._shards.info
        self.size, self.classes = self._shards.size, self._shards.classes
        self.inputs: dict[str, Any] = {
            "source": _absolute(str(path)),
            "list_sha256": self._shards.fingerprint,
            "count": len(self._shards),
        }
        self.shard_sizes = [shard["samples"] for shard in info["shards"]]
        self._first = [shard["first_index"] for shard in info["shards"]]
        self.pictures_at = str(info["inputs"].get("source", path))

    @property
    def names(self) -> list[str]:
        return self._shards.sources

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return FromShards, (self._shards.path,)

    def slice(self, number: int) -> list[Load]:
        rows = pq.read_table(shard_paths(self._shards.path, number)[1]).to_pylist()
        return [partial(self._load, self._first[number] + place, row) for place, row in enumerate(rows)]

    def _load(self, index: int, row: dict[str, Any]) -> Stored:
        """A damaged picture raises SampleError: its labels may not go missing."""
        sample = self._shards.read(index)
        x0, y0, x1, y1 = (row[side] for side in BOX)
        source_size = (row["src_width"], row["src_height"])
        pixels = _pixels(sample.jpeg)
        return Stored(sample.key, row["source"], sample.class_id, b"", pixels, source_size, (x0, y0, x1, y1))


Source = FromPictures | FromShards


def _absolute(source: str) -> str:
    return source if storage.is_remote(source) else str(Path(source).absolute())


def _pixels(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image)


def open_source(
    images: str | None, relabel: Path | None, *, size: int, quality: int, samples_per_shard: int, seed: int
) -> Source:
    """The pictures in `images`, or those of the shard set `relabel`.

    Raises:
        FileNotFoundError, ValueError, ShardError: There are none (see `list_pictures` and `ShardSet.open`).
    """
    if relabel is not None:
        return FromShards(relabel)
    return FromPictures(
        list_pictures(images or ""), size=size, quality=quality, samples_per_shard=samples_per_shard, seed=seed
    )
