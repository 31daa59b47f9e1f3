"""dataset.json, which says that a set is whole and what it is."""

from pathlib import Path
from typing import Any

from shards.atomic import read_json, sha256_file, sha256_json
from shards.errors import ShardError

FORMAT, VERSION = "semmae-shards", 1
NAMED = ("format", "version", "samples", "grid", "size", "groups", "classes", "shards", "index_sha256")
OF_SOME = ("heads", "labels_of")
"""Heads of the stored class attention; in a label set, the fingerprint of the set whose images it is of."""
OF_SHARD = ("name", "samples", "first_index", "bytes", "sha256")


def read_info(folder: Path) -> dict[str, Any]:
    """dataset.json of a finished set; see `ShardSet.open` for what is raised."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no shard set at {folder}: expected a folder with dataset.json")
    if not (folder / "dataset.json").is_file():
        raise ShardError(
            f"{folder} has no dataset.json: it is not a shard set, or one whose extract command must be run again"
        )
    try:
        info = read_json(folder / "dataset.json")
    except ValueError as error:
        raise ShardError(str(error)) from None
    if (info.get("format"), info.get("version")) != (FORMAT, VERSION):
        raise ShardError(
            f"{folder} is {info.get('format')} version {info.get('version')}, expected {FORMAT} version {VERSION}; "
            "read it with the release that wrote it"
        )
    missing = [name for name in (*NAMED, "fingerprint") if name not in info]
    if missing or any(name not in shard for shard in info["shards"] for name in OF_SHARD):
        raise ShardError(
            f"{folder / 'dataset.json'} is damaged: it lacks {missing[0] if missing else 'what it says of a shard'}; "
            "run `verify --repair` on the set"
        )
    return info


def fingerprint(info: dict[str, Any]) -> str:
    """SHA-256 of what the set is, without where, when and by whom it was made."""
    return sha256_json(
        {name: info.get(name) for name in NAMED} | {name: info[name] for name in OF_SOME if name in info}
    )


def digests(info: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of each field of dataset.json that the fingerprint leaves out: where, when and by whom."""
    others = set(info) - {*NAMED, *OF_SOME, "digests"}
    return {name: sha256_json(info[name]) for name in sorted(others)}


def changed_fields(info: dict[str, Any]) -> list[str]:
    """Fields of dataset.json that are not as they were written; "fingerprint" stands for all that it covers. Sets of
    0.1.0 kept no digests of the others."""
    kept, now = info.get("digests"), digests(info)
    changed = set() if fingerprint(info) == info.get("fingerprint") else {"fingerprint"}
    if isinstance(kept, dict):
        changed |= {name for name in set(kept) | set(now) if kept.get(name) != now.get(name)}
    elif "plan" in info:
        changed.add("digests")
    return sorted(changed)


def is_named(folder: Path, info: dict[str, Any], name: str) -> bool:
    """Whether index.parquet or rejected.parquet is there, and the one that dataset.json names."""
    path = folder / name
    return path.is_file() and sha256_file(path) == info.get(f"{path.stem}_sha256")
