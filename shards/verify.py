"""What is wrong with a shard set: fast looks at files and sizes, hash at every digest, deep at every member."""

import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.atomic import json_bytes, read_json, sha256_file
from shards.decode import decode_jpeg_into
from shards.errors import SampleError, ShardError
from shards.index import load_rows
from shards.info import changed_fields, is_named, read_info
from shards.open_file import OpenFile
from shards.record import told_by_others
from shards.sample import HEADER, check_attention, check_labels
from shards.shard_set import ShardSet
from shards.writer import BLOCK, header_of, shard_paths


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is not as it was written."""

    shard: str
    """The file: a shard's, or one of the set's."""
    key: str
    """The sample; empty where none is to blame."""
    offset: int
    """Byte in the file; -1 where no byte is to blame."""
    what: str


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar: its name, where its bytes lie, and those of a class."""

    name: str
    offset: int
    size: int
    text: bytes = b""

    def __str__(self) -> str:
        return f"{self.name} ({self.size} bytes at {self.offset}{f': {self.text!r}' if self.text else ''})"


def verify(path: str | Path, level: Literal["fast", "hash", "deep"] = "fast") -> list[Fault]:
    """Every fault of the set in `path`, in shard order; each level does what those before it do.

    Raises:
        FileNotFoundError, ShardError: There is no finished set to look at: no folder, or no whole dataset.json.
    """
    folder = Path(path)
    info = read_info(folder)
    faults = list(_whole(folder, info))
    indexed = not any(fault.shard == "index.parquet" for fault in faults)
    if not indexed and level == "deep":
        faults.append(Fault("index.parquet", "", -1, "samples cannot be looked at without it; repair it first"))
    told = level == "deep" and not faults and "plan" in info
    for number in range(len(info["shards"])):
        sizes = list(_sizes(folder, info, number))
        faults += sizes
        if not sizes and level != "fast":
            faults += _digests(folder, info, number, index=not told)
    if told:
        faults += _small_files(folder, info, {fault.shard for fault in faults})
    if level == "deep" and indexed:
        with ShardSet.open(folder) as shards:
            for number in range(len(info["shards"])):
                if shard_paths(folder, number)[0].is_file():
                    faults += _members(shards, number)
                    faults += _samples(shards, number)
    return sorted(faults, key=lambda fault: fault.shard.partition(".")[0].isdigit() and int(fault.shard[:6]) + 1)


def _whole(folder: Path, info: dict[str, Any]) -> Iterator[Fault]:
    """What dataset.json says against itself, the merged index and the list of rejects."""
    for name in changed_fields(info):
        what = f"its field {name} is not as it was written"
        yield Fault(
            "dataset.json", "", -1, "the fingerprint does not fit its contents" if name == "fingerprint" else what
        )
    if sum(shard["samples"] for shard in info["shards"]) != info["samples"]:
        yield Fault("dataset.json", "", -1, f"its shards do not hold the {info['samples']} samples it reports")
    for name in ("index.parquet", "rejected.parquet"):
        if not (folder / name).is_file():
            yield Fault(name, "", -1, "is missing")
        elif not is_named(folder, info, name):
            yield Fault(name, "", -1, "is not the one dataset.json names")
    index = folder / "index.parquet"
    if is_named(folder, info, index.name):
        keys = load_rows(index)["key"]
        if len(keys) != info["samples"]:
            yield Fault(index.name, "", -1, f"has {len(keys)} rows, expected {info['samples']}")
        if len(np.unique(keys)) < len(keys):
            yield Fault(index.name, "", -1, "holds a key twice")


def _sizes(folder: Path, info: dict[str, Any], number: int) -> Iterator[Fault]:
    """The files of a shard against its sidecar, and that against dataset.json."""
    tar, index, sidecar = shard_paths(folder, number)
    told = info["shards"][number]
    expected = {tar: told["bytes"]}
    try:
        written = read_json(sidecar)
        expected[index], _ = written["index"]["bytes"], written["index"]["sha256"]
        if (written["samples"], written["tar"]["sha256"]) != (told["samples"], told["sha256"]):
            yield Fault(sidecar.name, "", -1, "reports another shard than dataset.json")
    except FileNotFoundError:
        yield Fault(sidecar.name, "", -1, "is missing")
    except (ValueError, KeyError, TypeError):
        yield Fault(sidecar.name, "", -1, "is no sidecar")
    for path, size in expected.items():
        if not path.is_file():
            yield Fault(path.name, "", -1, "is missing")
        elif path.stat().st_size != size:
            yield Fault(path.name, "", path.stat().st_size, f"has {path.stat().st_size} bytes, expected {size}")


def _digests(folder: Path, info: dict[str, Any], number: int, *, index: bool) -> Iterator[Fault]:
    """The tar's digest, and that of the shard's `index` where nothing better tells its contents."""
    tar, table, sidecar = shard_paths(folder, number)
    if sha256_file(tar) != info["shards"][number]["sha256"]:
        yield Fault(tar.name, "", -1, "the sha256 differs")
    if index and sha256_file(table) != read_json(sidecar)["index"]["sha256"]:
        yield Fault(table.name, "", -1, "the sha256 differs")


def _small_files(folder: Path, info: dict[str, Any], known: set[str]) -> Iterator[Fault]:
    """dataset.json, plan.json, sidecars and indexes byte by byte, but for those `known` to be faulty."""
    expected = [(folder / "dataset.json", json_bytes(info)), *told_by_others(folder, info)]
    for path, contents in expected:
        if path.name not in known and (not path.is_file() or path.read_bytes() != contents):
            yield Fault(path.name, "", -1, "is not as it was written" if path.is_file() else "is missing")


def _members(shards: ShardSet, number: int) -> Iterator[Fault]:
    """The first member that is not where and what the index says; after it, nothing is in place."""
    path = shard_paths(shards.path, number)[0]
    file = OpenFile(path)
    for there, meant in zip_longest(_walk(path), _meant(shards, number)):
        header = file.read(BLOCK, there.offset - BLOCK) if there else b""
        if there and there == meant and header != header_of(there.name, there.size):
            # tarfile overlooks a byte of its checksum field
            yield Fault(path.name, there.name.partition(".")[0], there.offset - BLOCK, "its header differs")
            return
        if there != meant:
            at = meant or there
            key = at.name.partition(".")[0] if at else ""
            yield Fault(
                path.name, key, at.offset if at else -1, f"expected {meant or 'the end'}, found {there or 'the end'}"
            )
            return


def _walk(path: Path) -> list[Member]:
    """The members as a stock tool sees them, until it cannot go on."""
    members = []
    with suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".cls") else None
            members.append(Member(member.name, member.offset_data, member.size, file.read() if file else b""))
    return members


def _meant(shards: ShardSet, number: int) -> Iterator[Member]:
    """The members as the index tells them."""
    told, cells = shards.info["shards"][number], shards.grid**2
    for index in range(told["first_index"], told["first_index"] + told["samples"]):
        row = shards.row(index)
        key = f"{row.key:08d}"
        if row.jpg_size:
            yield Member(f"{key}.jpg", row.begin, row.jpg_size)
            if row.class_id >= 0:
                text = str(row.class_id).encode()
                yield Member(f"{key}.cls", row.begin + row.parts - 2 * BLOCK, len(text), text)
        yield Member(f"{key}.parts.npy", row.begin + row.parts, HEADER + cells)
        yield Member(f"{key}.fgrank.npy", row.begin + row.fgrank, HEADER + 2 * cells)
        if shards.heads:
            yield Member(f"{key}.attn.npy", row.begin + row.attn, HEADER + shards.heads * cells)


def _samples(shards: ShardSet, number: int) -> Iterator[Fault]:
    """Read every sample as training would: checksums, .npy headers, labels, pixels."""
    pixels = np.empty((shards.size, shards.size, 3), np.uint8)
    first = shards.info["shards"][number]["first_index"]
    for index in range(first, first + shards.info["shards"][number]["samples"]):
        try:
            sample = shards.read(index, attention=shards.heads > 0)
            check_labels(sample.parts, sample.fgrank, groups=shards.groups, name=sample.key)
            if sample.attn is not None and sample.attn_peak is not None:
                check_attention(sample.attn, sample.attn_peak, name=sample.key)
            if sample.jpeg:
                decode_jpeg_into(sample.jpeg, pixels)
        except SampleError as error:
            yield Fault(f"{number:06d}.tar", error.key, error.offset, str(error))
        except (ShardError, ValueError, OSError) as error:
            row = shards.row(index)
            yield Fault(f"{number:06d}.tar", f"{row.key:08d}", row.begin, str(error))
