"""A small masking study that takes what time is left: pretrainings by several seeds, the longest wait first.

A run is trained in stretches and keeps its checkpoint, so that any number of calls add up to it. On drawings, where
colour tells the kind, it shows that the machinery works and says nothing about maskings: give it `--data`.
"""

import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.on_gpu.against_cpu import TOY, drawings
from benchmarks.on_gpu.case import Bars, Bench, Case, Unfinished
from benchmarks.rounds import Row, exact
from evaluate.config import KnnConfig
from evaluate.knn import knn
from pretrain.config import PretrainConfig, StreamRun
from pretrain.train import pretrain
from shards.shard_set import ShardSet
from training import checkpoint

BARS: Bars = {}
MASKINGS: tuple[Literal["random", "semmae"], ...] = ("random", "semmae")
SEEDS = (0, 1, 2)
STEPS, STRETCHES, BATCH = 1000, 4, 256
MODEL = {"embed_dim": 384, "depth": 12, "heads": 6, "decoder_dim": 256, "decoder_depth": 4, "decoder_heads": 8}


def cases(bench: Bench) -> list[Case]:
    """A run of each masking by each seed, then their comparison."""
    seeds = SEEDS[:2] if bench.rehearse else SEEDS
    where = "" if bench.data else ", drawings"
    runs = [
        Case(f"{masking}, seed {seed}{where}", partial(_run, bench, masking, seed), 15)
        for seed in seeds
        for masking in MASKINGS
    ]
    return [*runs, Case(f"semmae less random{where}", partial(_compared, bench, seeds), seconds=1)]


def config_of(bench: Bench, masking: Literal["random", "semmae"], seed: int) -> PretrainConfig:
    """A ViT-S; patches a side are the cells a side, or half of them where that is more than 16."""
    data = bench.data or str(drawings(bench).shards)
    with ShardSet.open(data) as shards:
        side = shards.grid if shards.grid <= 16 else shards.grid // 2
        patch, images = shards.size // side, len(shards)
    steps, batch = (8, 8) if bench.rehearse else (STEPS, BATCH)
    sizes: dict[str, Any] = TOY if bench.rehearse else MODEL
    epochs = max(1, steps * batch // images)
    return PretrainConfig(
        data=data,
        masking=masking,
        patch=patch,
        epochs=epochs,
        warmup_epochs=epochs / 10,
        batch_size=batch,
        base_lr=1e-3,
        seed=seed,
        run=StreamRun(
            out=bench.out / "study" / f"{masking}-{seed}",
            device=bench.device,
            threads=bench.cores,
            checkpoint_minutes=0.1,
        ),
        **sizes,
    )


def _run(bench: Bench, masking: Literal["random", "semmae"], seed: int) -> Iterator[Row]:
    """Stretch after stretch while one more fits; then k-NN on held-out images (every fifth)."""
    config = config_of(bench, masking, seed)
    with ShardSet.open(config.data) as shards:
        steps = math.ceil(config.epochs * len(shards) / config.batch_size)
    stretch, longest = math.ceil(steps / STRETCHES), 0.0
    while not (config.run.out / "DONE.json").is_file():
        done = _steps_done(config.run.out)
        if bench.left() < 1.3 * longest:
            raise Unfinished(f"{done} of {steps} steps")
        began = time.perf_counter()
        pretrain(config, stop_after_steps=done + stretch)
        longest = max(longest, time.perf_counter() - began)
    yield exact("k-NN top1", accuracy(config), "%", 1)


def accuracy(config: PretrainConfig) -> float:
    """Percent right by the 20 nearest neighbours of mean patch tokens; computed once a run."""
    results = config.run.out / "results.jsonl"
    if not results.is_file():
        knn(KnnConfig(checkpoint=str(config.run.out), data=config.data, pool="mean", device=config.run.device))
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return next(row["value"] for row in rows if row["metric"] == "top1")


def _steps_done(run: Path) -> int:
    newest = checkpoint.newest(run)
    return int(newest.name.removeprefix("step-")) if newest else 0


def _compared(bench: Bench, seeds: tuple[int, ...]) -> Iterator[Row]:
    """The mean difference over seeds, and its standard error: pairs share their data order and first weights."""
    pairs = [[config_of(bench, masking, seed) for masking in ("semmae", "random")] for seed in seeds]
    waiting = sum(not (config.run.out / "DONE.json").is_file() for pair in pairs for config in pair)
    if waiting:
        raise Unfinished(f"{waiting} runs are not finished")
    differences = np.array([accuracy(one) - accuracy(other) for one, other in pairs])
    yield exact("k-NN top1", float(differences.mean()), "points", len(seeds))
    yield exact("standard error", float(differences.std(ddof=1) / np.sqrt(len(seeds))), "points", len(seeds))
