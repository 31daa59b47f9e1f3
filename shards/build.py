"""A shard set in the making: its plan and its completion. With `dataset.json`, written last, the set is whole."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.atomic import read_json, sha256_file, sha256_json, sweep, write_json, write_whole
from shards.errors import ShardError
from shards.index import merged, table_bytes
from shards.info import FORMAT, VERSION, changed_fields, digests, fingerprint, is_named
from shards.writer import shard_paths

COMPUTED = ("device", "precision")
"""Fields of a plan, and of sidecars, that say what labels are computed with."""
NEW_IN_PLANS = (*COMPUTED, "encoder_mean", "encoder_std")
"""Plans of 0.1.0 lack these."""
REJECTED = pa.schema([("source", pa.string()), ("ordinal", pa.int64()), ("step", pa.string()), ("reason", pa.string())])


def open_plan(folder: Path, plan: dict[str, Any]) -> str:
    """Write plan.json at the first call, compare with it once a shard is there; returns the plan's digest.

    A plan of 0.1.0 does not say what labels are computed with; where the set is whole, its dataset.json does.

    Raises:
        ValueError: The folder was started with another plan, or holds something else.
    """
    path = folder / "plan.json"
    if path.is_file():
        kept = read_json(path)
        theirs = kept | _told_by_earlier(folder, kept, plan)
        differing = [name for name in sorted(set(plan) | set(theirs)) if theirs.get(name) != plan.get(name)]
        if not differing:
            return sha256_json(kept)
        if any((folder / "shards").glob("*.tar")):
            raise ValueError(_refusal(folder, theirs, plan, differing))
        write_json(path, plan)  # nothing was built: the first try was refused, or ran out of memory
    elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is neither empty nor a shard set (no plan.json); choose another --out")
    else:
        write_json(path, plan)
    return sha256_json(plan)


WORDS = {
    "inputs_sha256": "other images, names or classes",
    "encoder_sha256": "other encoder weights",
    "learner_sha256": "other parts",
    "truth_sha256": "other part maps (--parts truth) or --boxes",
    "source": "--images",
    "inputs": "number of images",
}
"""What entries of a plan are to people; where it is a digest, that another one came says it all."""


def _in_words(name: str, then: Any, now: Any) -> str:
    said = WORDS.get(name, "--" + name.replace("_", "-"))
    return said if name.endswith("_sha256") else f"{said} was {then!r}, now {now!r}"


def _told_by_earlier(folder: Path, kept: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """What a whole set of 0.1.0 says in dataset.json alone: what its labels were computed with."""
    if not (folder / "dataset.json").is_file():
        return {}
    labels = read_json(folder / "dataset.json").get("producer", {}).get("labels", {})
    encoder = labels.get("encoder") or {}
    told = labels | {"encoder_mean": encoder.get("mean"), "encoder_std": encoder.get("std")}
    return {name: told[name] for name in NEW_IN_PLANS if name in plan and name not in kept and told.get(name)}


def _refusal(folder: Path, theirs: dict[str, Any], plan: dict[str, Any], differing: list[str]) -> str:
    """Which fields differ, and the way out."""
    if not set(differing) <= set(NEW_IN_PLANS if not set(COMPUTED) & set(theirs) else COMPUTED):
        told = "; ".join(_in_words(name, theirs.get(name), plan.get(name)) for name in differing)
        return f"{folder} was started with other settings ({told}); choose another --out or the old settings"
    then, now = (" ".join(f"--{name} {one.get(name)}" for name in COMPUTED) for one in (theirs, plan))
    if not set(COMPUTED) & set(theirs):
        return (
            f"{folder} was started by a release that did not keep on which device and in which precision labels are "
            f"computed, so it cannot go on with {now}; choose another --out"
        )
    return (
        f"the labels in {folder} were computed with {then}, now it would be {now}, and one set has labels of one kind; "
        f"pass {then} (on a machine that has it), or choose another --out"
    )


def shard_done(folder: Path, number: int, plan_digest: str) -> bool:
    """Whether a shard is whole: its sidecar is there, of this plan, and the sizes are right."""
    tar, index, sidecar = shard_paths(folder, number)
    if not (tar.is_file() and index.is_file() and sidecar.is_file()):
        return False
    sizes = (tar.stat().st_size, index.stat().st_size)
    try:
        told = read_json(sidecar)
        return told["plan"] == plan_digest and sizes == (told["tar"]["bytes"], told["index"]["bytes"])
    except (ValueError, KeyError, TypeError):  # damaged: the shard is built once more, to the same bytes
        return False


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
    write_whole(folder / "rejected.parquet", rejected_bytes(rejected))
    whole = {
        **info,
        "plan": read_json(folder / "plan.json"),
        "format": FORMAT,
        "version": VERSION,
        "samples": first,
        "rejected": len(rejected),
        "shards": shards,
        "index_sha256": sha256_file(folder / "index.parquet"),
        "rejected_sha256": sha256_file(folder / "rejected.parquet"),
    }
    whole["fingerprint"] = fingerprint(whole)
    whole["digests"] = digests(whole)
    write_json(folder / "dataset.json", whole)
    return whole


def _still_whole(folder: Path, sidecars: list[dict[str, Any]]) -> dict[str, Any] | None:
    """dataset.json, when it is as it was written, of these very shards and of the index beside it."""
    if not (folder / "dataset.json").is_file():
        return None
    whole = read_json(folder / "dataset.json")
    same = not changed_fields(whole) and all(
        is_named(folder, whole, name) for name in ("index.parquet", "rejected.parquet")
    )
    named = [shard["sha256"] for shard in whole.get("shards", [])]
    return whole if same and named == [told["tar"]["sha256"] for told in sidecars] else None


def rejected_bytes(rejected: list[dict[str, Any]]) -> bytes:
    """rejected.parquet, from what the sidecars tell in the order of the shards."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rejected, schema=REJECTED), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
