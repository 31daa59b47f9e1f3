"""A shard set: its plan, its completion, and reading it. `dataset.json` is written last; with it, the set is whole."""

import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.atomic import read_json, sha256_file, sha256_json, sweep, write_json, write_whole
from shards.errors import ShardError
from shards.sample import Sample, from_npy
from shards.writer import shard_paths

FORMAT, VERSION = "semmae-shards", 1
REJECTED = pa.schema(
    [("source", pa.string()), ("ordinal", pa.int64()), ("stage", pa.string()), ("reason", pa.string())]
)


def open_plan(folder: Path, plan: dict[str, Any]) -> str:
    """Write plan.json at the first call, compare with it later; returns the plan's digest.

    Raises:
        ValueError: The folder was started with another plan, or holds something else.
    """
    path = folder / "plan.json"
    if path.is_file():
        theirs = read_json(path)
        differing = [
            f"{name} was {theirs.get(name)!r}, now {plan.get(name)!r}"
            for name in sorted(set(plan) | set(theirs))
            if theirs.get(name) != plan.get(name)
        ]
        if differing:
            raise ValueError(
                f"{folder} was started with other settings ({'; '.join(differing)}); "
                "choose another --out or the old settings"
            )
    elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is neither empty nor a shard set (no plan.json); choose another --out")
    else:
        write_json(path, plan)
    return sha256_json(plan)


def shard_done(folder: Path, number: int, plan_digest: str) -> bool:
    """Whether a shard is whole: its sidecar is there, of this plan, and the sizes are right."""
    tar, index, sidecar = shard_paths(folder, number)
    if not (tar.is_file() and index.is_file() and sidecar.is_file()):
        return False
    told = read_json(sidecar)
    sizes = (tar.stat().st_size, index.stat().st_size)
    return told["plan"] == plan_digest and sizes == (told["tar"]["bytes"], told["index"]["bytes"])


def finalise(folder: Path, *, shard_count: int, plan_digest: str, info: dict[str, Any]) -> dict[str, Any]:
    """Merge the shards' indexes and rejects, and write dataset.json; a set that is whole already stays untouched.

    Only the one builder of a folder may call this: it sweeps away what killed writers left.

    Raises:
        ShardError: A shard is missing, or inputs are neither in the index nor among the rejects.
    """
    missing = [number for number in range(shard_count) if not shard_done(folder, number, plan_digest)]
    if missing:
        raise ShardError(
            f"{folder} lacks {len(missing)} of {shard_count} shards, the first {missing[0]:06d}; run extract again"
        )
    sidecars = [read_json(shard_paths(folder, number)[2]) for number in range(shard_count)]
    whole = _still_whole(folder, sidecars)
    if whole:
        return whole
    for written in (folder, folder / "shards"):
        sweep(written)
    shards, tables, rejected, first = [], [], [], 0
    for number, told in enumerate(sidecars):
        tar, index, _ = shard_paths(folder, number)
        table = pq.read_table(index)
        count = table.num_rows
        table = table.append_column("index", pa.array(np.arange(first, first + count), pa.uint32()))
        tables.append(table.append_column("shard", pa.array(np.full(count, number), pa.uint32())))
        shards.append({"name": tar.name, "samples": count, "first_index": first} | told["tar"])
        rejected += told["rejected"]
        first += count
    if first + len(rejected) != info["inputs"]["count"]:
        raise ShardError(
            f"{folder}: {first} samples and {len(rejected)} rejects do not sum to {info['inputs']['count']} inputs; "
            "delete the folder and extract again"
        )
    if not first:
        raise ShardError(
            f"none of the {len(rejected)} pictures could be read, the first because: {rejected[0]['reason']}"
        )
    _write_table(folder / "index.parquet", pa.concat_tables(tables))
    _write_table(folder / "rejected.parquet", pa.Table.from_pylist(rejected, schema=REJECTED))
    whole = {
        **info,
        "format": FORMAT,
        "version": VERSION,
        "samples": first,
        "rejected": len(rejected),
        "shards": shards,
        "index_sha256": sha256_file(folder / "index.parquet"),
    }
    whole["fingerprint"] = fingerprint(whole)
    write_json(folder / "dataset.json", whole)
    return whole


def _still_whole(folder: Path, sidecars: list[dict[str, Any]]) -> dict[str, Any] | None:
    """dataset.json, when it is there and is of these very shards and of the index beside it."""
    if not all((folder / name).is_file() for name in ("dataset.json", "index.parquet", "rejected.parquet")):
        return None
    whole = read_json(folder / "dataset.json")
    named = [shard["sha256"] for shard in whole["shards"]]
    same = named == [told["tar"]["sha256"] for told in sidecars]
    return whole if same and sha256_file(folder / "index.parquet") == whole["index_sha256"] else None


def fingerprint(info: dict[str, Any]) -> str:
    """SHA-256 of what the set is, without where, when and by whom it was made."""
    names = ("format", "version", "samples", "grid", "size", "groups", "classes", "shards", "index_sha256")
    return sha256_json({name: info[name] for name in names})


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_whole(path, sink.getvalue().to_pybytes())


class ShardSet:
    """An open, whole shard set. Reads are single `pread`s, safe from any thread; every checksum is compared."""

    def __init__(self, path: Path, info: dict[str, Any], table: pa.Table):
        self.path, self.info, self._table = path, info, table
        self.grid, self.size, self.groups = int(info["grid"]), int(info["size"]), int(info["groups"])
        self.classes: tuple[str, ...] = tuple(info["classes"])
        self.fingerprint: str = info["fingerprint"]
        whole = [field.name for field in table.schema if pa.types.is_integer(field.type)]
        self._columns = {name: table[name].to_numpy() for name in whole}
        self.class_ids = self._columns["class_id"].astype(np.int64)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> "ShardSet":
        """Open the set in `path`.

        Raises:
            FileNotFoundError: There is no such folder.
            ShardError: The set is not finished, of another format, or its index is not the one it names.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"no shard set at {path}: expected a folder with dataset.json")
        if not (folder / "dataset.json").is_file():
            raise ShardError(f"{path} has no dataset.json: the set is not finished; run the same extract command again")
        try:
            info = read_json(folder / "dataset.json")
        except ValueError as error:
            raise ShardError(str(error)) from None
        if (info.get("format"), info.get("version")) != (FORMAT, VERSION):
            raise ShardError(
                f"{path} is {info.get('format')} version {info.get('version')}, expected {FORMAT} version {VERSION}; "
                "read it with the release that wrote it"
            )
        if not (folder / "index.parquet").is_file() or sha256_file(folder / "index.parquet") != info["index_sha256"]:
            raise ShardError(
                f"{folder / 'index.parquet'} is missing or not the one dataset.json names; "
                "run the same extract command again"
            )
        return cls(folder, info, pq.read_table(folder / "index.parquet"))

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def keys(self) -> list[str]:
        return self._table["key"].to_pylist()

    @property
    def sources(self) -> list[str]:
        return self._table["source"].to_pylist()

    def row(self, index: int) -> dict[str, int]:
        """What the index says of sample `index`: class, shard, offsets, checksums."""
        return {name: int(column[index]) for name, column in self._columns.items()}

    def offset(self, index: int) -> int:
        """Byte in its tar where the picture of sample `index` begins."""
        return int(self._columns["jpg_offset"][index])

    def where(self, index: int) -> str:
        """Sample `index` in words: key, shard, byte."""
        tar = shard_paths(self.path, int(self._columns["shard"][index]))[0]
        return f"{self._table['key'][index]} of {tar} at byte {self.offset(index)}"

    def read(self, index: int) -> Sample:
        """Sample `index`, with one read.

        Raises:
            ShardError: The bytes are not those that were written; names shard, key and offset.
        """
        at = self.row(index)
        begin = at["jpg_offset"]
        span = os.pread(self._file(at["shard"]), at["span_end"] - begin, begin)
        members = {
            "jpg": (begin, begin + at["jpg_size"]),
            "parts": (at["parts_offset"], at["parts_offset"] + 128 + self.grid**2),
            "fgrank": (at["fgrank_offset"], at["span_end"]),
        }
        data, key = {}, self._table["key"][index].as_py()
        for member, (first, end) in members.items():
            data[member] = span[first - begin : end - begin]
            if zlib.crc32(data[member]) != at[f"crc32_{member}"]:
                raise ShardError(
                    f"{at['shard']:06d}.tar: {member} of {key} at byte {first} is damaged (checksum differs); delete "
                    f"{at['shard']:06d}.json in {self.path / 'shards'} and run the same extract command again"
                )
        return Sample(
            index,
            key,
            data["jpg"],
            from_npy(data["parts"], "|u1", self.grid),
            from_npy(data["fgrank"], "<u2", self.grid),
            at["class_id"],
        )

    def _file(self, shard: int) -> int:
        """Descriptor of a tar, kept open: closing one that another thread is reading would hand it wrong bytes."""
        with self._lock:
            if shard not in self._files:
                path = shard_paths(self.path, shard)[0]
                try:
                    self._files[shard] = os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    raise ShardError(f"{path} is missing; run the same extract command again") from None
            return self._files[shard]

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
