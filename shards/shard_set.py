"""Reading a whole shard set: one `pread` a sample, every checksum compared, safe from any thread."""

import math
import shlex
import threading
import zlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from shards import storage
from shards.atomic import sha256_file
from shards.cache import Cache
from shards.errors import SampleError, ShardError
from shards.index import Row, load_peaks, load_rows, read_column
from shards.info import read_info
from shards.open_file import OpenFile
from shards.sample import HEADER, Sample, npy_header
from shards.writer import shard_paths

MOST_OPEN = 256
"""Tars kept open; a process may usually open 1,024 files, and a set may have more shards than that."""
TRIES = 10
AGAIN = "run `verify --repair` on the set"
SOURCE = ("parts", "encoder", "encoder_block", "encoder_mean", "encoder_std", "num_parts", "grid")
"""Settings of `extract` that decide the labels of given images."""
PARTS, RANKS = np.dtype("|u1"), np.dtype("<u2")


class ShardSet:
    """An open, whole shard set; with `labels`, the labels come from a label set over the same images."""

    def __init__(self, path: Path, info: dict[str, Any], rows: np.ndarray, cache: Cache | None):
        self.path, self.info, self.cache = path, info, cache
        self.size, self.grid, self.groups = int(info["size"]), int(info["grid"]), int(info["groups"])
        self.heads = int(info.get("heads", 0))
        self.classes: tuple[str, ...] = tuple(info["classes"])
        self.fingerprint: str = info["fingerprint"]
        self.labels: ShardSet | None = None
        self._rows = rows
        square = (self.grid, self.grid)
        self._forms = {
            "parts": _form(PARTS, square),
            "fgrank": _form(RANKS, square),
            "attn": _form(PARTS, (self.heads, *square)),
        }
        self._files: dict[int, OpenFile] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        labels: str | Path | None = None,
        cache: str | Path | None = None,
        cache_bytes: int = 50_000_000_000,
    ) -> "ShardSet":
        """Open the set in `path`, a folder or a URI.

        Args:
            labels: A label set over it: a folder, or the name of one in `path`/labels.
            cache: Local folder into which the shards are copied, with checksums, before they are read.
            cache_bytes: Most that the copies may take there.

        Raises:
            FileNotFoundError: There is no such folder, or there are no such labels.
            ValueError: The set is remote and no `cache` is given, or the labels are of other images.
            ShardError: The set is not finished, of another format, or its index is not the one it names.
        """
        if cache is None and storage.is_remote(path):
            raise ValueError(f"{path} is remote: name with --cache a folder on a local disk for copies of its shards")
        copies = None if cache is None else Cache(str(path), Path(cache), cache_bytes)
        folder = copies.folder if copies else Path(path)
        info = read_info(folder)
        index = folder / "index.parquet"
        if not index.is_file() or sha256_file(index) != info["index_sha256"]:
            raise ShardError(f"{index} is missing or not the one dataset.json names; {AGAIN}")
        if copies:
            copies.expect(info["shards"])
        opened = cls(folder, info, load_rows(index), copies)
        if labels is not None:
            named = Path(path) / "labels" / labels
            if not (named.is_dir() or Path(labels).is_dir() or storage.is_remote(labels)):
                raise FileNotFoundError(_no_labels(labels, Path(path)))
            opened._take_labels(named if named.is_dir() else labels)
        return opened

    def _take_labels(self, folder: str | Path) -> None:
        if storage.is_remote(folder):
            raise ValueError(f"the labels {folder} are remote; copy the label set to a local disk (shards are cached)")
        theirs = ShardSet.open(folder)
        if theirs.info.get("labels_of") != self.fingerprint:
            raise ValueError(
                f"the labels in {folder} belong to the shard set {theirs.info.get('labels_of', theirs.fingerprint)}, "
                f"and {self.path} is {self.fingerprint}; make labels for it with `extract --relabel`"
            )
        self.labels, self.grid, self.groups, self.heads = theirs, theirs.grid, theirs.groups, theirs.heads

    @property
    def num_parts(self) -> int:
        """Parts that the set says its labels have; the background, where there is one, is one group more. A set that
        does not say has a background."""
        producer = (self.labels or self).info.get("producer", {})
        return producer.get("labels", {}).get("parts", max(1, self.groups - 1))

    @property
    def background(self) -> int | None:
        """The label that means no part; None where every label is a part."""
        return self.num_parts if self.num_parts < self.groups else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def identity(self) -> str:
        """Fingerprint of what is read: of the images, and of the labels laid over them."""
        return f"{self.fingerprint}+{self.labels.fingerprint}" if self.labels else self.fingerprint

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard."""
        return np.array([shard["samples"] for shard in self.info["shards"]], np.int64)

    @property
    def class_ids(self) -> np.ndarray:
        """Class of each sample; -1 without classes."""
        return self._rows["class_id"].astype(np.int64)

    @property
    def keys(self) -> list[str]:
        return [f"{key:08d}" for key in self._rows["key"].tolist()]

    @property
    def sources(self) -> list[str]:
        return read_column(self.path / "index.parquet", "source")

    @cached_property
    def peaks(self) -> Float32[np.ndarray, "samples heads"] | None:
        """The greatest class attention of each head in each image; None without class attention, or where an earlier
        release stored it without."""
        if self.labels:
            return self.labels.peaks
        return load_peaks(self.path / "index.parquet", self.heads) if self.heads else None

    def row(self, index: int) -> Row:
        """What the index says of sample `index`."""
        return Row(*self._rows[index].item())

    def read(self, index: int, *, attention: bool = False) -> Sample:
        """Sample `index`, with one read of its shard; with `attention`, its class attention too.

        Raises:
            SampleError: The bytes are not those that were written; names shard, key, member and offset.
        """
        row = self.row(index)
        if self.labels is None:
            span = self._span(row, 0, attention)
            parts, fgrank, attn = self._labels(row, span, 0, attention)
        else:
            span = self._file(row.shard).read(row.jpg_size, row.begin)
            parts, fgrank, attn = self.labels.read_labels(index, attention=attention)
        jpeg = span[: row.jpg_size]
        if zlib.crc32(jpeg) != row.crc32_jpg:
            raise self._damaged(row, "jpg", 0)
        peaks = self.peaks if attention else None
        peak = None if peaks is None else peaks[index]
        return Sample(index, f"{row.key:08d}", jpeg, parts, fgrank, row.class_id, attn, peak)

    def read_labels(self, index: int, *, attention: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Parts, ranks and perhaps class attention of sample `index`, without its image."""
        row = self.row(index)
        return self._labels(row, self._span(row, row.parts, attention), row.parts, attention)

    def _span(self, row: Row, first: int, attention: bool) -> bytes:
        """A sample's bytes from `first` to the end of its labels."""
        end = row.attn + self._forms["attn"].size if attention else row.fgrank + self._forms["fgrank"].size
        return self._file(row.shard).read(end - first, row.begin + first)

    def _labels(
        self, row: Row, span: bytes, first: int, attention: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The labels in bytes that begin at `first`."""
        parts = self._array(row, "parts", span, row.parts - first, row.crc32_parts)
        fgrank = self._array(row, "fgrank", span, row.fgrank - first, row.crc32_fgrank)
        attn = self._array(row, "attn", span, row.attn - first, row.crc32_attn) if attention else None
        return parts, fgrank, attn

    def _array(self, row: Row, member: str, span: bytes, at: int, checksum: int) -> np.ndarray:
        """The array of a member at `at` in the bytes read, without a copy."""
        header, kind, shape, size = self._forms[member]
        data = span[at : at + size]
        if zlib.crc32(data) != checksum:
            raise self._damaged(row, member, getattr(row, member))
        if not data.startswith(header):
            what = f"is no .npy of {kind.name} {'x'.join(map(str, shape))}, as dataset.json has it"
            raise self._damaged(row, member, getattr(row, member), what)
        return np.frombuffer(data, kind, offset=HEADER).reshape(shape)

    def _damaged(
        self, row: Row, member: str, first: int, what: str = "is damaged: its checksum differs"
    ) -> SampleError:
        tar = shard_paths(self.path, row.shard)[0]
        return SampleError(str(tar), f"{row.key:08d}", member, row.begin + first, f"{what}; {AGAIN}")

    def damaged(self, index: int, what: str) -> SampleError:
        """The error of a sample whose checksum is right and whose image is not."""
        return self._damaged(self.row(index), "jpg", 0, what)

    def refuse_labels_alone(self) -> None:
        """Raises ValueError for a label set, where images are asked for."""
        if "labels_of" in self.info:
            raise ValueError(
                f"{self.path} holds labels alone; name the shard set that they were made for, and them as its labels"
            )

    def refuse_no_attention(self) -> None:
        """Raises ValueError where no class attention is stored, or none whose heads can be compared."""
        labels = self.labels or self
        told = labels.info.get("producer", {}).get("config", {})
        drawn = told.get("boxes") or told.get("parts") == "truth"
        same = [] if drawn else [word for name in SOURCE for word in _option(name, told.get(name))]
        command = shlex.join(["semmae", "extract", "--relabel", str(self.path), *same, "--attention", "--out", "DIR"])
        way = f"make it with `{command}` and take --labels DIR"
        if drawn:
            way += "; its labels are then those of `builtin`"
        if not self.heads:
            raise ValueError(f"the labels of {labels.path} hold no class attention; {way}")
        if self.peaks is None:
            raise ValueError(
                f"the class attention of {labels.path} was stored by an earlier release, without its heads' peaks, and "
                f"its heads cannot be compared; {way}"
            )

    def refuse_missing(self) -> None:
        """Look at the size of every tar, before an epoch that would trip over it.

        Raises:
            ShardError: One is missing, or shorter or longer than it was written.
        """
        for number, told in enumerate([] if self.cache else self.info["shards"]):
            tar = shard_paths(self.path, number)[0]
            size = tar.stat().st_size if tar.is_file() else None
            if size != told["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes, expected {told['bytes']}"
                raise ShardError(f"{tar} {state}; {AGAIN}")
        if self.labels:
            self.labels.refuse_missing()

    def _file(self, shard: int) -> OpenFile:
        """A tar, opened at the first use; the least recently used are let go."""
        with self._lock:
            file = self._files.pop(shard, None)
        if file is None:
            file = self._opened(shard)  # outside the lock: it may be copied first
        with self._lock:
            self._files[shard] = file
            if len(self._files) > MOST_OPEN:
                del self._files[next(iter(self._files))]
            return file

    def _opened(self, shard: int) -> OpenFile:
        path = shard_paths(self.path, shard)[0]
        for _ in range(TRIES if self.cache else 1):  # another rank may make room between the copy and its opening
            if self.cache:
                path, copied = self.cache.local(shard)
                if copied:
                    self._let_go_of_deleted()
            with suppress(FileNotFoundError):
                return OpenFile(path)
        raise ShardError(f"{path} is missing; {AGAIN}")

    def reached(self, position: int) -> None:
        """Reading has come to `position`: copies of shards before it may go.

        Raises:
            ShardError: See `Cache.reached`.
        """
        if self.cache:
            self.cache.reached(position)
        self._let_go_of_deleted()

    def _let_go_of_deleted(self) -> None:
        """An open file keeps its room on the disk after it is deleted, whoever deletes it."""
        if self.cache:
            with self._lock:
                self._files = {shard: file for shard, file in self._files.items() if not file.deleted}

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            self._files.clear()
        if self.cache:
            self.cache.close()
        if self.labels:
            self.labels.close()

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _option(name: str, value: Any) -> list[str]:
    """A setting of `extract` as words of its command line; none where it is the default."""
    if value is None or (name, value) == ("parts", "builtin"):
        return []
    return ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]


class _Form(NamedTuple):
    """What a member of labels must look like."""

    header: bytes
    kind: np.dtype
    shape: tuple[int, ...]
    size: int


def _form(kind: np.dtype, shape: tuple[int, ...]) -> _Form:
    return _Form(npy_header(kind, shape), kind, shape, HEADER + math.prod(shape) * kind.itemsize)


def _no_labels(labels: str | Path, folder: Path) -> str:
    """What to say of labels that are not there: those that are, and how others are made."""
    there = sorted(one.parent.name for one in folder.glob("labels/*/dataset.json"))
    has = f"labels/ has {', '.join(there)}" if there else "the set has no labels/"
    return (
        f"no labels {labels}: {has}; make some with `semmae extract --relabel {folder} --out {folder}/labels/NAME` and "
        "take --labels NAME, or give the folder of a label set"
    )
