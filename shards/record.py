"""The small files of a finished set, each as the others say it is: plan.json, sidecars, shard indexes, dataset.json."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.atomic import json_bytes, read_json, sha256_bytes, sha256_file, sha256_json, write_whole
from shards.build import COMPUTED, rejected_bytes
from shards.index import merged, rows_of_shard, table_bytes
from shards.info import FORMAT, NAMED, OF_SOME, VERSION, changed_fields, fingerprint, is_named
from shards.writer import shard_paths


def told_by_others(folder: Path, info: dict[str, Any]) -> Iterator[tuple[Path, bytes]]:
    """plan.json, and the index and sidecar of every shard: where each is, and its bytes as the rest of the set tells.

    For sets whose dataset.json holds the plan and is whole, as are index.parquet and rejected.parquet.
    """
    yield folder / "plan.json", json_bytes(info["plan"])
    plan, table = sha256_json(info["plan"]), pq.read_table(folder / "index.parquet")
    rejected = pq.read_table(folder / "rejected.parquet").to_pylist()
    for number, told in enumerate(info["shards"]):
        _, index, sidecar = shard_paths(folder, number)
        rows = rows_of_shard(table, told["first_index"], told["samples"])
        contents = _index_bytes(index, sidecar, table_bytes(rows))
        first = number * info["plan"].get("samples_per_shard", 0)
        ordinals = range(first, first + info["plan"].get("samples_per_shard", 0))
        written = {
            "plan": plan,
            "samples": told["samples"],
            "tar": {"bytes": told["bytes"], "sha256": told["sha256"]},
            "index": {"bytes": len(contents), "sha256": sha256_bytes(contents)},
            "rejected": [one for one in rejected if one["ordinal"] in ordinals],
            **_computed(info["plan"], sidecar),
        }
        yield index, contents
        yield sidecar, json_bytes(written)


def _computed(plan: dict[str, Any], sidecar: Path) -> dict[str, str]:
    """What labels were computed with; shards that were repaired in a set whose plan does not say, say it alone."""
    told = plan
    if not set(COMPUTED) & set(plan):
        with suppress(FileNotFoundError, ValueError):
            told = read_json(sidecar)
    return {name: told[name] for name in COMPUTED if name in told}


def _index_bytes(index: Path, sidecar: Path, ours: bytes) -> bytes:
    """A shard's index as this pyarrow writes it; as another wrote it, where the file and its sidecar agree on that."""
    if index.is_file() and sidecar.is_file():
        contents = index.read_bytes()
        if sha256_bytes(contents).encode() in sidecar.read_bytes():
            return contents
    return ours


def restore(folder: Path) -> list[str]:
    """Write once more each small file that is not as the others say, as far as they do; tars are left alone.

    Returns:
        The names of the files that are as they were written again.

    Without a dataset.json that is JSON, nothing is done.
    """
    try:
        info = _restored(folder, read_json(folder / "dataset.json"))
    except (FileNotFoundError, ValueError):
        return []
    if changed_fields(info) or "plan" not in info:
        return []
    merged_again = [
        (folder / name, contents)
        for name, contents in _merged_again(folder, len(info["shards"]))
        if sha256_bytes(contents) == info[f"{Path(name).stem}_sha256"]
    ]
    written = _write_changed([(folder / "dataset.json", json_bytes(info)), *merged_again])
    if all(is_named(folder, info, name) for name in ("index.parquet", "rejected.parquet")):
        written += _write_changed(told_by_others(folder, info), whole=_whole_tars(folder, info))
    return written


def _whole_tars(folder: Path, info: dict[str, Any]) -> Callable[[Path], bool]:
    """Whether a file may be written: a sidecar vouches for its tar, and so only for the tar that was written."""

    def may_be(path: Path) -> bool:
        if not path.stem.isdigit() or path.suffix != ".json":
            return True
        tar = path.with_suffix(".tar")
        return tar.is_file() and sha256_file(tar) == info["shards"][int(path.stem)]["sha256"]

    return may_be


def _write_changed(
    files: Iterable[tuple[Path, bytes]], *, whole: Callable[[Path], bool] = lambda path: True
) -> list[str]:
    """Write each file that does not hold its bytes; their names."""
    changed = [(path, told) for path, told in files if not path.is_file() or path.read_bytes() != told]
    changed = [(path, told) for path, told in changed if whole(path)]
    for path, told in changed:
        write_whole(path, told)
    return [path.name for path, _ in changed]


def _merged_again(folder: Path, shards: int) -> Iterator[tuple[str, bytes]]:
    """rejected.parquet and index.parquet, as far as the files of the shards are there and whole to tell them."""
    paths = [shard_paths(folder, number) for number in range(shards)]
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        told = [read_json(sidecar) for *_, sidecar in paths]
        yield "rejected.parquet", rejected_bytes([one for shard in told for one in shard["rejected"]])
        indexes = [index for _, index, _ in paths]
        if [sha256_file(index) for index in indexes] == [shard["index"]["sha256"] for shard in told]:
            yield "index.parquet", table_bytes(merged([pq.read_table(index) for index in indexes]))


def _restored(folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """dataset.json with the fields that another file holds too, where these fit its digests and its own do not."""
    known = {*info.get("digests", info), *NAMED, *OF_SOME, "digests"}
    info = {name: info[name] for name in info if name in known}
    for name, value in _held_twice(folder, info):
        other = info | {name: value}
        if len(changed_fields(other)) < len(changed_fields(info)):
            info = other
    return info


def _held_twice(folder: Path, info: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields of dataset.json that another file tells too, as it has them."""
    index, rejects = folder / "index.parquet", folder / "rejected.parquet"
    yield "format", FORMAT
    yield "version", VERSION
    with suppress(FileNotFoundError, ValueError):
        yield "plan", read_json(folder / "plan.json")
    with suppress(OSError, pa.ArrowException):
        yield "samples", pq.read_metadata(index).num_rows
        yield "index_sha256", sha256_file(index)
    with suppress(OSError, pa.ArrowException):
        yield "rejected", pq.read_metadata(rejects).num_rows
        yield "rejected_sha256", sha256_file(rejects)
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        yield "shards", _shards(folder)
    plan = info["plan"] if isinstance(info.get("plan"), dict) else {}
    yield from ((name, plan[name]) for name in ("grid", "size", "groups", "heads") if name in plan)
    with suppress(KeyError):
        yield "labels_of", plan["inputs_sha256"]
        yield "inputs", {"source": plan["source"], "list_sha256": plan["inputs_sha256"], "count": plan["inputs"]}
    yield "fingerprint", fingerprint(info)


def _shards(folder: Path) -> list[dict[str, Any]]:
    """What dataset.json says of the shards, from their sidecars."""
    told, first = [], 0
    for sidecar in sorted((folder / "shards").glob("*.json")):
        written = read_json(sidecar)
        head = {"name": sidecar.with_suffix(".tar").name, "samples": written["samples"], "first_index": first}
        told.append(head | written["tar"])
        first += written["samples"]
    return told
