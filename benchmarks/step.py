"""What a step of pretraining costs, and AutoMAE's where its scorer's attention is read or computed."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from benchmarks.drawn_batch import drawn_batch
from benchmarks.rounds import Case, Report, gate_in_words, interleaved, ratios, repeated, summary
from encoders.load import load_encoder
from pretrain.config import PretrainConfig, StreamRun
from pretrain.masking.inputs import Inputs
from pretrain.objective import Objective, new_masking
from pretrain.train import build, masked_loss, new_optimizer
from shards.batches import Batch
from training.config import RunConfig
from training.device import pick_device, plain_attention_on_cpu
from training.update import update

SIDE, PATCH, PARTS, HEADS = 14, 16, 7, 12
SCORER, TOY_SCORER = "random:vit_base_patch16_224", "random:vit_tiny_patch16_224"
TOY: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 2,
    "heads": 3,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def bench_step(*, minutes: float, run: RunConfig, rehearse: bool = False) -> Report:
    """Measure whole steps on one batch: masks, forward, backward and update. `ours` masks by parts.

    Args:
        rehearse: A toy in place of ViT-B/16, and 2 images in place of 16.
    """
    device = pick_device(run.device)
    sizes, name, images = (TOY, TOY_SCORER, 2) if rehearse else ({}, SCORER, 16)
    batch = drawn_batch(images, side=PATCH * SIDE, grid=SIDE, groups=PARTS, heads=HEADS)
    scorer = load_encoder(name, grid=SIDE, device=device, precision=run.precision)
    ours, automae = _step(batch, "semmae", sizes, run), _step(batch, "automae", sizes, run)

    def with_scorer() -> None:
        scorer(torch.from_numpy(batch.images))
        automae()

    calls = {"ours": ours, "automae": automae, "automae_with_scorer": with_scorer}
    cases = [Case(name, repeated(call, images)) for name, call in calls.items()]
    pairs = [("automae", "ours"), ("automae_with_scorer", "automae")]
    blocks = interleaved(cases, pairs=pairs, minutes=minutes, what="bench step")
    rows = [summary(case.name, case.unit, blocks[case.name]) for case in cases]
    rows += [summary(f"{over}/{under}", "ratio", ratios(blocks[over], blocks[under])) for over, under in pairs]
    expected = "" if rehearse else ": 35 of 94 GFLOP an image, so that 0.63 is to be expected"
    caption = (
        f"{'A toy' if rehearse else 'ViT-B/16, decoder of 8 blocks'}, {PATCH * SIDE} px, {images} images a step, on "
        f"{device}, one core. automae reads its scorer's attention; automae_with_scorer computes it in every step, as "
        f"the released code does{expected}. {gate_in_words()}"
    )
    return Report(rows, {}, caption)


def _step(
    batch: Batch, masking: Literal["semmae", "automae"], sizes: dict[str, Any], run: RunConfig
) -> Callable[[], None]:
    """A step of such a run on the batch."""
    device = pick_device(run.device)
    where = StreamRun(out=run.out, device=run.device, precision=run.precision)
    config = PretrainConfig(data="", masking=masking, batch_size=len(batch.images), run=where, **sizes)
    mae = build(config, PATCH * SIDE)
    objective = Objective(mae, new_masking(config, mae, HEADS)).to(device)
    plain_attention_on_cpu(objective, device)
    optimizer, rate = new_optimizer(objective, config), config.base_lr

    def step() -> None:
        inputs = Inputs(batch, config, config.seed, (SIDE, SIDE), PARTS, device=device)
        if objective.masking is not None:
            objective.masking.begin(inputs, rate)
        update(optimizer, [masked_loss(objective, objective.masked(inputs, 0.5), config, device)], rate=rate)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
