"""Extraction with a ViT-S of 784 tokens: images a second of whole shards, and which of its pieces holds them up."""

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.extract import TimedLabeller, untrained_parts
from benchmarks.on_gpu.against_cpu import drawings
from benchmarks.on_gpu.case import Bars, Bench, Case
from benchmarks.on_gpu.drawn import source_of
from benchmarks.on_gpu.timing import quartiles, rate, seconds_of
from benchmarks.rounds import Row, exact
from partlearn.config import ExtractConfig
from partlearn.labelling.shard import build_shard
from partlearn.labelling.sources import Stored
from shards.images import list_images
from training.config import RunConfig

BARS: Bars = {"extract_over_slowest_piece": (">=", 0.8)}
ENCODER, GRID = "random:vit_small_patch16_224", 28
TOY_ENCODER, TOY_GRID = "random:vit_tiny_patch16_224", 4
BATCHES = (64, 256)


def cases(bench: Bench) -> list[Case]:
    """The pieces, then shards as `extract` builds them, at two batches."""
    batches = (4,) if bench.rehearse else BATCHES
    return [
        Case("read, square, encode, decode", partial(_load, bench)),
        *(Case(f"encoder, batch {batch}", partial(_encoder, bench, batch)) for batch in batches),
        *(Case(f"whole shards, batch {batch}", partial(_shards, bench, batch), seconds=10) for batch in batches),
    ]


def config_of(bench: Bench, batch: int, out: Path) -> ExtractConfig:
    return ExtractConfig(
        images=str(drawings(bench).folder),
        samples_per_shard=8 if bench.rehearse else 512,
        batch_size=batch,
        run=RunConfig(out=out, device=bench.device, threads=bench.cores),
    )


def load_images(bench: Bench) -> tuple[list[Stored], float]:
    """The first shard's images, and how many a second threads for every core prepared."""
    loads = source_of(config_of(bench, 1, bench.out)).slice(0).loads()
    began = time.perf_counter()
    with ThreadPoolExecutor(bench.cores) as pool:
        loaded = [one for one in pool.map(lambda load: load(), loads) if isinstance(one, Stored)]
    return loaded, len(loaded) / (time.perf_counter() - began)


def _load(bench: Bench) -> Iterator[Row]:
    yield quartiles("images", "images/s", [load_images(bench)[1] for _ in range(3)])


def _encoder(bench: Bench, batch: int) -> Iterator[Row]:
    """The ViT alone, on pixels that are on the device already; then with everything that makes labels of its tokens
    and brings them back to the host."""
    labeller = labeller_of(bench)
    images = np.stack([stored.pixels for stored in load_images(bench)[0]])
    images = np.resize(images, (batch, *images.shape[1:]))
    there, seconds = torch.from_numpy(images).to(bench.device), bench.measuring(1.5)
    yield rate("encoder", batch, seconds_of(lambda: labeller.encoder(there), device=bench.device, seconds=seconds))
    yield rate("labeller", batch, seconds_of(lambda: labeller(images), device=bench.device, seconds=seconds))


def _shards(bench: Bench, batch: int) -> Iterator[Row]:
    """Whole shards; the labeller's share of the time says whether the device or the host is waited for."""
    labeller = labeller_of(bench)
    _, loading = load_images(bench)
    rates, shares = [], []
    for _ in range(1 if bench.rehearse else 3):
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            config = config_of(bench, batch, Path(folder))
            labeller.seconds, began = 0.0, time.perf_counter()
            told = build_shard(source_of(config).slice(0), labeller=labeller, config=config, plan_digest="bench")
            whole = time.perf_counter() - began
        rates.append(told["samples"] / whole)
        shares.append(labeller.seconds / whole)
    yield quartiles("images", "images/s", rates)
    yield quartiles("in_models", "share", shares)
    models = float(np.median(rates)) / float(np.median(shares))
    yield exact("models_alone", models, "images/s", len(rates))
    yield exact("loading_alone", loading, "images/s", 1)
    yield exact("extract_over_slowest_piece", float(np.median(rates)) / min(models, loading), "share", len(rates))


def labeller_of(bench: Bench) -> TimedLabeller:
    encoder, grid = (TOY_ENCODER, TOY_GRID) if bench.rehearse else (ENCODER, GRID)
    out, run = bench.out / "extraction", RunConfig(out=bench.out, device=bench.device)
    out.mkdir(exist_ok=True)
    parts = untrained_parts(list_images(drawings(bench).folder), out, run, encoder=encoder, grid=grid)
    return TimedLabeller.of_parts(parts, device=torch.device(bench.device))
