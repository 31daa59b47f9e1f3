"""The verb `extract`: one call builds one shard, in this process or on Ray actors; a killed build goes on."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from partlearn.build import build_shard, shard_count
from partlearn.config import ExtractConfig
from partlearn.label import Labeller
from shards.dataset import finalise, open_plan, shard_done
from shards.errors import ShardError
from shards.pictures import PictureList, list_pictures
from training.device import pick_device
from training.progress import Progress
from training.run import as_json, git_state, package_versions

ATTEMPTS = 3


def extract(config: ExtractConfig) -> dict[str, Any]:
    """Label every picture of `config.images` into the shard set `config.run.out`, and return its dataset.json.

    Every shard owns a fixed slice of the seeded order of inputs and is committed whole; a rerun builds what is
    missing and touches nothing else. A shard that fails is tried three times; the others are built all the same.

    Raises:
        ValueError: The folder was started with other settings, inputs or weights.
        ShardError: Shards failed, or another process builds in this folder.
    """
    folder = Path(config.run.out)
    pictures = list_pictures(config.images)
    labeller = load_labeller(config)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            return _extract(config, folder, pictures, labeller)
    except Timeout:
        raise ShardError(f"{folder} is being built by another process; wait for it or choose another --out") from None


def load_labeller(config: ExtractConfig) -> Labeller:
    return Labeller(
        config.parts,
        encoder=config.encoder,
        grid=config.grid,
        device=pick_device(config.run.device),
        precision=config.run.precision,
    )


def _extract(config: ExtractConfig, folder: Path, pictures: PictureList, labeller: Labeller) -> dict[str, Any]:
    plan = _plan(config, pictures, labeller)
    digest = open_plan(folder, plan)
    count = shard_count(len(pictures.pictures), config)
    missing = [number for number in range(count) if not shard_done(folder, number, digest)]
    if missing:
        build = _on_ray if config.backend == "ray" else _here
        done = min(len(pictures.pictures), (count - len(missing)) * config.samples_per_shard)
        progress = Progress(len(pictures.pictures), "extracting", "pictures", done=done)
        failed, rejected, retries = {}, 0, 0
        for number, outcome in build(missing, pictures, labeller, config, digest):
            if isinstance(outcome, Exception):
                failed[number] = outcome
                retries += 1
                continue
            failed.pop(number, None)
            rejected += len(outcome["rejected"])
            progress.advance(outcome["samples"] + len(outcome["rejected"]), rejected=rejected, retries=retries)
        progress.close(rejected=rejected, retries=retries)
        if failed:
            number, error = next(iter(failed.items()))
            raise ShardError(
                f"{len(failed)} of {count} shards failed {ATTEMPTS} times, first shard {number} with "
                f"{type(error).__name__}: {error}; the others are kept, mend the cause and run the same command again"
            ) from error
    producer = {
        "config": as_json(config) | {"run": None, "backend": None, "workers": None, "gpus_per_worker": None},
        "labels": labeller.describe(),
        "versions": package_versions(),
        "git": git_state(),
    }
    info = finalise(
        folder,
        shard_count=count,
        plan_digest=digest,
        info={
            "grid": labeller.grid,
            "groups": labeller.groups,
            "size": config.size,
            "classes": list(pictures.classes),
            "inputs": {
                "source": pictures.source,
                "list_sha256": pictures.digest,
                "count": len(pictures.pictures),
            },
            "producer": producer,
        },
    )
    _tell_rejected(folder, info)
    return info


def _tell_rejected(folder: Path, info: dict[str, Any]) -> None:
    if info["rejected"]:
        print(
            f"{info['rejected']} of {info['inputs']['count']} pictures could not be read and are listed, "
            f"with the reason, in {folder / 'rejected.parquet'}",
            file=sys.stderr,
        )


def _plan(config: ExtractConfig, pictures: PictureList, labeller: Labeller) -> dict[str, Any]:
    """What decides the bytes of every shard; a folder takes one plan for life."""
    encoder = labeller.encoder.description
    return {
        "inputs_sha256": pictures.digest,
        "inputs": len(pictures.pictures),
        "samples_per_shard": config.samples_per_shard,
        "size": config.size,
        "quality": config.quality,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "grid": labeller.grid,
        "groups": labeller.groups,
        "encoder_sha256": encoder["weights_sha256"],
        "encoder_block": encoder["block"],
        "learner_sha256": labeller.sha256,
    }


Outcome = tuple[int, dict[str, Any] | Exception]


def _here(
    numbers: list[int], pictures: PictureList, labeller: Labeller, config: ExtractConfig, digest: str
) -> Iterator[Outcome]:
    """Shards one after the other in this process; an error is the caller's, at once: nothing here is flaky."""
    for number in numbers:
        yield (
            number,
            build_shard(number, pictures=pictures, labeller=labeller, config=config, plan_digest=digest),
        )


def _on_ray(
    numbers: list[int], pictures: PictureList, labeller: Labeller, config: ExtractConfig, digest: str
) -> Iterator[Outcome]:
    """Shards on a pool of actors, each with its own models; two tasks wait at every actor."""
    import ray

    from pipeline.cluster import connect, refuse_paths_of_the_upload

    refuse_paths_of_the_upload(config.run.out, config.parts)
    connect()
    resources = ray.cluster_resources()
    gpus = config.gpus_per_worker if resources.get("GPU") else 0.0
    most = resources["GPU"] // gpus if gpus else max(1, resources["CPU"] // 2)
    workers = min(config.workers or int(most), len(numbers))
    actor = ray.remote(num_gpus=gpus, num_cpus=1 if gpus else min(2, int(resources["CPU"])), max_restarts=-1)(Builder)
    shared = ray.put(pictures)
    pool: list[Any] = [actor.remote(config, shared, digest) for _ in range(workers)]
    todo, attempts, running = list(reversed(numbers)), dict.fromkeys(numbers, 0), {}

    def submit(builder: Any) -> None:
        if todo:
            number = todo.pop()
            attempts[number] += 1
            running[builder.build.remote(number)] = (number, builder)

    for builder in [*pool, *pool]:
        submit(builder)
    try:
        while running:
            done, _ = ray.wait(list(running), num_returns=1)
            number, builder = running.pop(done[0])
            try:
                yield number, ray.get(done[0])
            except ray.exceptions.RayError as error:
                if attempts[number] < ATTEMPTS:
                    todo.append(number)
                cause = getattr(error, "cause", None)
                yield number, cause if isinstance(cause, Exception) else error
            submit(builder)
    finally:
        for builder in pool:
            ray.kill(builder)


class Builder:
    """A Ray actor: holds the models, builds any shard it is asked for."""

    def __init__(self, config: ExtractConfig, pictures: PictureList, digest: str):
        self.config, self.pictures, self.digest = config, pictures, digest
        torch.set_num_threads(max(1, config.run.threads))
        self.labeller = load_labeller(config)

    def build(self, number: int) -> dict[str, Any]:
        return build_shard(
            number,
            pictures=self.pictures,
            labeller=self.labeller,
            config=self.config,
            plan_digest=self.digest,
        )
