"""The verb `extract`: one call builds one shard, in this process or on Ray actors; a killed build goes on."""

import sys
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from partlearn.config import ExtractConfig
from partlearn.labelling.protocol import Labeller, folder_of, open_labeller
from partlearn.labelling.shard import Builder
from partlearn.labelling.sources import FromImages, Source, open_source
from pipeline.cluster.pool import ATTEMPTS, Outcome, build_on_ray, on_a_worker
from shards.atomic import read_json, sha256_json
from shards.build import finalise, open_plan, shard_done
from shards.errors import ShardError
from shards.places import lock_of, only_to_be_read, refuse_unwritable
from shards.writer import shard_paths
from training.device import computed_here, devices_here
from training.progress import Progress
from training.run_folder import git_state, package_versions
from training.same_run import as_json

HOW = ("run", "backend", "num_workers", "gpus_per_worker", "retry_failed")
"""Fields that say how a set is built, not what it is."""


def extract(config: ExtractConfig, *, faulty: Collection[str] = ()) -> dict[str, Any]:
    """Label every image of `config.images` into the shard set `config.run.out`, and return its dataset.json.

    With `config.relabel`, a label set over the images of that shard set. Every shard owns a fixed slice of the
    inputs and is committed whole; a rerun builds what is missing and touches nothing else. All labels are computed on
    one type of device and in one precision; `auto` is what a worker finds, or what a whole set was made with. On Ray a
    shard that fails is tried three times and the others are built all the same; in this process its error ends the
    build at once.

    Args:
        faulty: Files of the set that are not as they were written; they and the shards they belong to are made again.

    Raises:
        ValueError: The folder was started with other settings, inputs (their place, names or classes) or weights, or on
            another type of device or in another precision and is not whole; or it cannot be written.
        ShardError: Shards failed, too many images are unreadable, or another process builds in this folder.
    """
    folder = Path(config.run.out)
    finished = (folder / "dataset.json").is_file() and only_to_be_read(folder)
    if not finished:
        refuse_unwritable(folder)
    source = open_source(
        config.images,
        config.relabel,
        size=config.size,
        quality=config.quality,
        samples_per_shard=config.samples_per_shard,
        seed=config.seed,
    )
    on_ray = config.backend == "ray"
    labeller = open_labeller(_computing(config, {"device": "cpu"}) if on_ray else config, source)  # there workers label
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with nullcontext() if finished else lock_of(folder):
            taken_back = _rejecting(folder, len(source.shard_sizes)) if config.retry_failed else []
            taken_back += [int(Path(name).stem) for name in faulty if Path(name).stem.isdigit()]
            whole = not taken_back and _whole(folder, len(source.shard_sizes))
            computed = _computed(config, folder, labeller, whole=whole)
            plan_digest = open_plan(folder, _plan(config, source, labeller) | computed)
            _take_back(folder, taken_back, faulty)
            built = _build_missing(_computing(config, computed), folder, source, labeller, plan_digest)
            info = _finish(config, folder, source, labeller, plan_digest, computed)
    except Timeout:
        raise ShardError(f"{folder} is being built by another process; wait for it or choose another --out") from None
    print(closing_line(folder, info, source.left_out, built=built))
    return info


def closing_line(folder: Path, info: dict[str, Any], left_out: str, *, built: int) -> str:
    """What became of everything that was seen: images, shards, rejected, left out, and classes."""
    classes = info["classes"]
    names = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
    return (
        f"{folder}: {_counted(info['samples'], 'image')} in {_counted(len(info['shards']), 'shard')}"
        f"{'' if built else ', built before'}; {info['rejected']:,} rejected; left out: {left_out or 'nothing'}; "
        + (f"{_counted(len(classes), 'class', 'classes')} ({names})" if classes else "no classes")
    )


def _counted(count: int, one: str, several: str = "") -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def _computing(config: ExtractConfig, computed: dict[str, Any]) -> ExtractConfig:
    """The same extraction on another device, or in another precision."""
    return replace(config, run=replace(config.run, **computed))


def _computed(config: ExtractConfig, folder: Path, labeller: Labeller, *, whole: bool) -> dict[str, str]:
    """Device type and precision of all labels; nothing for those that depend on neither.

    What is asked for. `auto` is what a whole set was made with; else what is found where labels are computed.
    """
    asked = {name: getattr(config.run, name) for name in labeller.computed}
    if "auto" not in asked.values():
        return asked
    if whole:
        labels = read_json(folder / "dataset.json").get("producer", {}).get("labels", {})  # plans of 0.1.0 do not say
        found = labeller.computed | labels | read_json(folder / "plan.json")
    elif config.backend == "ray":
        found = on_a_worker(
            computed_here, config.run.device, config.run.precision, gpus_per_worker=config.gpus_per_worker
        )
    else:
        found = labeller.computed
    return {name: found[name] if value == "auto" else value for name, value in asked.items()}


def _whole(folder: Path, count: int) -> bool:
    """Whether nothing of a set is left to compute."""
    if not ((folder / "dataset.json").is_file() and (folder / "plan.json").is_file()):
        return False
    digest = sha256_json(read_json(folder / "plan.json"))
    return all(shard_done(folder, number, digest) for number in range(count))


def _plan(config: ExtractConfig, source: Source, labeller: Labeller) -> dict[str, Any]:
    """What decides the bytes of every shard, with what labels are computed with; a folder takes one plan for life."""
    images = {
        "samples_per_shard": config.samples_per_shard,
        "size": config.size,
        "quality": config.quality,
        "seed": config.seed,
    }
    return {
        "source": source.inputs["source"],
        "inputs_sha256": source.inputs["list_sha256"],
        "inputs": source.inputs["count"],
        "batch_size": config.batch_size,
        "grid": labeller.grid,
        "groups": labeller.groups,
        "heads": labeller.heads,
        **labeller.identity,
        **(images if isinstance(source, FromImages) else {"kind": "labels"}),
    }


def _rejecting(folder: Path, count: int) -> list[int]:
    """The shards that rejected images."""
    sidecars = ((number, shard_paths(folder, number)[2]) for number in range(count))
    return [number for number, sidecar in sidecars if sidecar.is_file() and read_json(sidecar)["rejected"]]


def _take_back(folder: Path, numbers: Collection[int], faulty: Collection[str]) -> None:
    """Have these shards built once more, and the faulty files that belong to no shard written again."""
    if numbers and not faulty:
        (folder / "dataset.json").unlink(missing_ok=True)
    for number in numbers:
        shard_paths(folder, number)[2].unlink(missing_ok=True)
    for name in faulty:
        if not Path(name).stem.isdigit():
            (folder / name).unlink(missing_ok=True)


def _build_missing(config: ExtractConfig, folder: Path, source: Source, labeller: Labeller, plan_digest: str) -> int:
    """Build what is missing; returns how many shards that was."""
    count = len(source.shard_sizes)
    missing = [number for number in range(count) if not shard_done(folder, number, plan_digest)]
    if not missing:
        return 0
    left = sum(source.shard_sizes[number] for number in missing)
    total = sum(source.shard_sizes)
    progress = Progress(total, "extracting", "images", done=total - left)
    build = _on_ray if config.backend == "ray" else _here
    failed, rejected, retries = {}, 0, 0
    for number, outcome in build(missing, source, labeller, config, plan_digest):
        retries += number in failed
        if isinstance(outcome, Exception):
            failed[number] = outcome
            continue
        failed.pop(number, None)
        rejected += len(outcome["rejected"])
        progress.advance(outcome["samples"] + len(outcome["rejected"]), rejected=rejected, retries=retries)
    progress.close(rejected=rejected, retries=retries)
    if failed:
        number, error = next(iter(failed.items()))
        raise ShardError(
            f"{len(failed)} of {count} shards failed {ATTEMPTS} times, first shard {number} with "
            f"{type(error).__name__}: {error}; the others are kept, repair the cause and run the same command again"
        ) from error
    return len(missing)


def _finish(
    config: ExtractConfig,
    folder: Path,
    source: Source,
    labeller: Labeller,
    plan_digest: str,
    computed: dict[str, str],
) -> dict[str, Any]:
    """dataset.json, with everything that is needed to build the set again."""
    info: dict[str, Any] = {
        "grid": labeller.grid,
        "groups": labeller.groups,
        "size": source.size,
        "classes": list(source.classes),
        "inputs": source.inputs,
        "producer": {
            "config": {name: value for name, value in as_json(config).items() if name not in HOW},
            "labels": labeller.describe() | computed,
            "versions": package_versions(),
            "git": git_state(),
        },
    }
    _refuse_too_many_rejects(config, folder, source)
    if labeller.heads:
        info["heads"] = labeller.heads
    if config.relabel:
        info["labels_of"] = source.inputs["list_sha256"]
    whole = finalise(folder, shard_count=len(source.shard_sizes), plan_digest=plan_digest, info=info)
    if whole["rejected"]:
        print(
            f"{whole['rejected']} of {whole['inputs']['count']} images could not be used and are listed, with the "
            f"reason, in {folder / 'rejected.parquet'}; once they are repaired, add --retry-failed",
            file=sys.stderr,
        )
    return whole


def _refuse_too_many_rejects(config: ExtractConfig, folder: Path, source: Source) -> None:
    """An outage of the storage must not pass for a set of few images."""
    rejected = [
        one
        for number in range(len(source.shard_sizes))
        for one in read_json(shard_paths(folder, number)[2])["rejected"]
    ]
    if len(rejected) > max(10, config.max_rejects * source.inputs["count"]):
        first = rejected[0]
        raise ShardError(
            f"{len(rejected)} of {source.inputs['count']} images could not be read, the first, {first['source']}, "
            f"because: {first['reason']}; repair them and add --retry-failed, or raise --max-rejects"
        )


def _here(
    numbers: list[int], source: Source, labeller: Labeller, config: ExtractConfig, plan_digest: str
) -> Iterator[Outcome]:
    """Shards one after the other in this process; an error is the caller's, at once: nothing here is flaky."""
    builder = Builder(config, plan_digest, labeller)
    for number in numbers:
        yield number, builder.build(source.slice(number))


def _on_ray(
    numbers: list[int], source: Source, labeller: Labeller, config: ExtractConfig, plan_digest: str
) -> Iterator[Outcome]:
    """Shards on a pool of Ray actors, each with its own models; an actor gets the slice of the shard that it builds."""
    from pipeline.cluster.connect import connect, refuse_paths_of_the_upload

    parts = folder_of(config.parts)
    refuse_paths_of_the_upload(*(path for path in (config.run.out, parts, config.relabel) if path))
    connect()
    return build_on_ray(
        numbers,
        OnActor,
        (config, plan_digest, labeller if labeller.portable else None),
        order=source.slice,
        num_workers=config.num_workers,
        gpus_per_worker=config.gpus_per_worker,
    )


class OnActor(Builder):
    """A builder alone in its process: torch takes the threads it is given."""

    def __init__(self, config: ExtractConfig, plan_digest: str, labeller: Labeller | None):
        """Raises ValueError where a labeller must be opened, and the device that the plan names is not here."""
        if labeller is None and config.run.device not in devices_here():
            raise ValueError(
                f"the labels in {config.run.out} are computed with --device {config.run.device} --precision "
                f"{config.run.precision}, and a worker has {', '.join(devices_here())} alone; give Ray nodes that have "
                f"{config.run.device}, or choose another --out and --device"
            )
        torch.set_num_threads(max(1, config.run.threads))
        super().__init__(config, plan_digest, labeller)
