"""What is wrong with a shard set: fast looks at files and sizes, hash at every digest, deep at every member."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from shards.atomic import read_json, sha256_file
from shards.dataset import ShardSet, fingerprint
from shards.errors import ShardError
from shards.sample import check_labels
from shards.stream import decode_jpeg_into
from shards.writer import shard_paths


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is not as it was written."""

    shard: str
    key: str
    offset: int
    """Byte in the tar; -1 where no byte is to blame."""
    what: str


def verify(path: str | Path, level: Literal["fast", "hash", "deep"] = "fast") -> list[Fault]:
    """Every fault of the set in `path`, in shard order.

    Raises:
        FileNotFoundError, ShardError: There is no whole set to look at (see `ShardSet.open`).
    """
    with ShardSet.open(path) as shards:
        faults = [] if fingerprint(shards.info) == shards.fingerprint else [
            Fault("dataset.json", "", -1, "the fingerprint does not fit its contents")
        ]  # fmt: skip
        for number in range(len(shards.info["shards"])):
            found = list(_sizes(shards, number))
            if not found and level != "fast":
                found += _digests(shards, number)
            if level == "deep" and not any(fault.what == "is missing" for fault in found):
                found += _members(shards, number)
            faults += found
        return faults


def _sizes(shards: ShardSet, number: int) -> Iterator[Fault]:
    told = shards.info["shards"][number]
    for path in shard_paths(shards.path, number):
        if not path.is_file():
            yield Fault(path.name, "", -1, "is missing")
        elif path.suffix == ".tar" and path.stat().st_size != told["bytes"]:
            yield Fault(
                path.name,
                "",
                path.stat().st_size,
                f"has {path.stat().st_size} bytes, expected {told['bytes']}",
            )


def _digests(shards: ShardSet, number: int) -> Iterator[Fault]:
    tar, index, sidecar = shard_paths(shards.path, number)
    for path, expected in (
        (tar, shards.info["shards"][number]["sha256"]),
        (index, read_json(sidecar)["index"]["sha256"]),
    ):
        if sha256_file(path) != expected:
            yield Fault(path.name, "", -1, "the sha256 differs")


def _members(shards: ShardSet, number: int) -> Iterator[Fault]:
    """Walk the tar beside the index, then read every sample as training would."""
    told = shards.info["shards"][number]
    tar_path = shard_paths(shards.path, number)[0]
    keys = shards.keys[told["first_index"] : told["first_index"] + told["samples"]]
    expected = [
        f"{key}.{kind}"
        for key in keys
        for kind in ("jpg", *(["cls"] if shards.classes else []), "parts.npy", "fgrank.npy")
    ]
    try:
        with tarfile.open(tar_path, "r:") as tar:
            members = [(member.name, member.offset_data) for member in tar]
    except tarfile.TarError as error:
        members = []
        yield Fault(tar_path.name, "", 0, f"is no whole tar: {error}")
    for place, name in enumerate(expected[: len(members)]):
        if members[place][0] != name:
            yield Fault(
                tar_path.name,
                name.partition(".")[0],
                members[place][1],
                f"holds {members[place][0]}, expected {name}",
            )
            break
    if members and len(members) != len(expected):
        yield Fault(tar_path.name, "", -1, f"holds {len(members)} members, expected {len(expected)}")
    pixels = np.empty((shards.size, shards.size, 3), np.uint8)
    for offset, key in enumerate(keys):
        try:
            sample = shards.read(told["first_index"] + offset)
            check_labels(sample.parts, sample.fgrank, groups=shards.groups, name=sample.key)
            decode_jpeg_into(sample.jpeg, pixels)
        except (ShardError, ValueError, OSError) as error:
            yield Fault(tar_path.name, key, shards.offset(told["first_index"] + offset), str(error))
