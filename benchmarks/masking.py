"""What the masks of a batch cost, a strategy a row: stored labels in, visible and masked patches out, on one core."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.drawn_batch import drawn_batch
from benchmarks.rounds import BLOCK_S, Block, Case, Report, gate_in_words, interleaved, repeated, summary
from pretrain.config import PretrainConfig, StreamRun
from pretrain.masking.automae import AutoMAE
from pretrain.masking.batch import mask_batch, masked_by
from pretrain.masking.hpm import hard_count, hard_scores
from pretrain.masking.inputs import Inputs
from pretrain.masking.strategies import STRATEGIES
from pretrain.train import build
from shards.batches import Batch

BATCH, SHAPE, GRID, GROUPS, HEADS = 256, (14, 14), 28, 7, 6
BARS = {"random": ("<=", 10.0), "semmae": ("<=", 25.0)}
OTHERS = ("<=", 60.0)


def bench_masking(*, minutes: float, block_s: float = BLOCK_S) -> Report:
    """Measure `mask_batch` for every strategy; HPM's masks given the predicted losses; AutoMAE's with its generator.

    256 images of 14x14 patches; labels of 28x28 cells in 7 groups.
    """
    batch = drawn_batch(BATCH, side=1, grid=GRID, groups=GROUPS, heads=HEADS)
    threads = torch.get_num_threads()
    predicted = torch.rand(BATCH, SHAPE[0] * SHAPE[1], generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], object]] = {name: partial(_masked, name, batch) for name in STRATEGIES}
    calls |= {"hpm": partial(_hpm, batch, predicted), "automae": _automae(batch)}
    cases = [Case(name, repeated(call, BATCH)) for name, call in calls.items()]
    torch.set_num_threads(1)
    try:
        pairs = [(one.name, one.name) for one in cases]
        blocks = interleaved(cases, pairs=pairs, minutes=minutes, what="bench masking", block_s=block_s)
    finally:
        torch.set_num_threads(threads)
    rows = [
        summary(name, "us/image", [Block(1e6 / block.value, block.foreign) for block in found])
        for name, found in blocks.items()
    ]
    caption = (
        f"Masks of {BATCH} images at a time, {SHAPE[0]}x{SHAPE[1]} patches, {GRID}x{GRID} cells in {GROUPS} groups, "
        f"attention of {HEADS} heads; from stored arrays and draws to indices, on one core. {gate_in_words()}"
    )
    return Report(rows, {name: BARS.get(name, OTHERS) for name in blocks}, caption)


def _hpm(batch: Batch, predicted: torch.Tensor) -> None:
    inputs = Inputs(batch, PretrainConfig(data="", masking="hpm", run=StreamRun(out=Path())), 0, SHAPE, GROUPS)
    masked_by(hard_scores(inputs.noise, predicted, hard_count(inputs.masked, 0.5, 0.5)), inputs)


def _automae(batch: Batch) -> Callable[[], object]:
    """Of a generator as it begins; its time does not depend on its weights."""
    config = PretrainConfig(data="", masking="automae", embed_dim=48, depth=1, heads=1, run=StreamRun(out=Path()))
    masking = AutoMAE(config, build(config, 16 * SHAPE[0]), HEADS)
    return lambda: masking.masked(Inputs(batch, config, 0, SHAPE, GROUPS), 0.5)


def _masked(name: Any, batch: Batch) -> None:
    config = PretrainConfig(data="", masking=name, run=StreamRun(out=Path()))
    mask_batch(Inputs(batch, config, 0, SHAPE, GROUPS), 0.5)
