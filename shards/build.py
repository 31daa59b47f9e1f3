"""A shard set in the making: its plan and its completion. With `dataset.json`, written last, the set is whole."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.atomic import read_json, sha256_file, sha256_json, sweep, write_json, write_whole
from shards.errors import ShardError
from shards.index import merged, table_bytes
from shards.shard_set import FORMAT, VERSION
from shards.writer import shard_paths

REJECTED = pa.schema([("source", pa.string()), ("ordinal", pa.int64()), ("step", pa.string()), ("reason", pa.string())])


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
        tables.append(table)
        shards.append({"name": tar.name, "samples": table.num_rows, "first_index": first} | told["tar"])
        rejected += told["rejected"]
        first += table.num_rows
    if first + len(rejected) != info["inputs"]["count"]:
        raise ShardError(
            f"{folder}: {first} samples and {len(rejected)} rejects do not sum to {info['inputs']['count']} inputs; "
            "delete the folder and extract again"
        )
    if not first:
        raise ShardError(
            f"none of the {len(rejected)} images could be read, the first because: {rejected[0]['reason']}"
        )
    write_whole(folder / "index.parquet", table_bytes(merged(tables)))
    write_whole(folder / "rejected.parquet", _parquet(pa.Table.from_pylist(rejected, schema=REJECTED)))
    whole = {
        **info,
        "format": FORMAT,
        "version": VERSION,
        "samples": first,
        "rejected": len(rejected),
        "shards": shards,
        "index_sha256": sha256_file(folder / "index.parquet"),
        "rejected_sha256": sha256_file(folder / "rejected.parquet"),
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
    for name in ("index", "rejected"):
        same = same and sha256_file(folder / f"{name}.parquet") == whole.get(f"{name}_sha256")
    return whole if same else None


OF_SOME = ("heads", "labels_of")
"""Heads of the stored class attention; in a label set, the fingerprint of the set whose images it is of."""


def fingerprint(info: dict[str, Any]) -> str:
    """SHA-256 of what the set is, without where, when and by whom it was made."""
    names = ("format", "version", "samples", "grid", "size", "groups", "classes", "shards", "index_sha256")
    return sha256_json({name: info[name] for name in names} | {name: info[name] for name in OF_SOME if name in info})


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
