"""What a step of the part learner costs beside the encoder's bare forward, in its literal form, on the same batch."""

from collections.abc import Callable
from contextlib import closing

import torch

from benchmarks.prepared import some_images
from benchmarks.rounds import Case, Report, gate_in_words, interleaved, ratios, summary
from encoders.load import load_encoder
from partlearn.config import LearnConfig
from partlearn.crops import TokenCrop, TokenCrops
from partlearn.initialise import start
from partlearn.train import PartLearning, new_learner, new_optimizer, parts_loss
from training.config import RunConfig
from training.device import pick_device
from training.update import update

ENCODER, GRID, BATCH = "random:vit_small_patch16_224", 28, 8
BARS = {"encoder_forward/step_fresh": ("<=", 1.7), "encoder_forward/step_cached": ("<=", 0.6)}
"""Images a second over images a second: how many bare forwards a step takes."""


def bench_learn(images: str, *, minutes: float, run: RunConfig, grid: int = GRID) -> Report:
    """Measure steps of `learn-parts --paper` with a target of 112 px: on fresh crops, and on tokens kept in memory.

    Args:
        grid: Cells a side; the bars are of the default.

    Raises:
        FileNotFoundError: There are no such images.
    """
    listed = some_images(images, BATCH)
    device = pick_device(run.device)
    encoder = load_encoder(ENCODER, grid=grid, device=device, precision=run.precision)
    config = LearnConfig(images=images, encoder=ENCODER, grid=grid, paper=True, crops=0, batch_size=BATCH, run=run)
    learner = new_learner(config, encoder).to(device)
    optimizer = new_optimizer(learner, config)
    views = TokenCrops(config, encoder, listed)
    start(learner, config, encoder, views)
    with closing(views.batches(step=0)) as batches:
        view = next(batches)

    def step(seen: TokenCrop) -> None:
        update(optimizer, [parts_loss(learner, config, encoder, seen)[0]], largest_norm=PartLearning.largest_norm)

    cases = [
        Case("encoder_forward", _repeated(lambda: encoder(view.pixels))),
        Case("step_fresh", _repeated(lambda: step(TokenCrop(view.pixels, encoder(view.pixels))))),
        Case("step_cached", _repeated(lambda: step(view))),
    ]
    pairs = [("encoder_forward", "step_fresh"), ("encoder_forward", "step_cached")]
    blocks = interleaved(cases, pairs=pairs, minutes=minutes, what="bench learn")
    rows = [summary(case.name, case.unit, blocks[case.name]) for case in cases]
    rows += [summary(f"{over}/{under}", "ratio", ratios(blocks[over], blocks[under])) for over, under in pairs]
    caption = (
        f"learn-parts --paper on {ENCODER}, {encoder.size} px, {BATCH} images a step, target 112 px, on {device}, "
        f"one core. A ratio counts the bare forwards that a step takes. {gate_in_words()}"
    )
    return Report(rows, BARS, caption)


def _repeated(call: Callable[[], object]) -> Callable[[float], int]:
    """One call a block: it takes longer than a block should."""

    def once(_: float) -> int:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return BATCH

    return once
