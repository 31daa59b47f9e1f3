"""One update of every stage, on any device and in any precision: what section `verbs` compares with the CPU's."""

from collections.abc import Iterable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.on_gpu.case import Bench
from benchmarks.on_gpu.drawn import Drawn, drawn
from benchmarks.prepared import some_images
from encoders.distill.config import EncoderConfig
from encoders.distill.train import Distillation, new_objective
from encoders.distill.train import new_optimizer as encoder_optimizer
from encoders.load import load_encoder
from partlearn.config import LearnConfig
from partlearn.crops import TokenCrop, TokenCrops
from partlearn.initialise import start
from partlearn.learner import PartLearner
from partlearn.train import PartLearning, new_learner, parts_loss
from partlearn.train import new_optimizer as learn_optimizer
from pretrain.config import PretrainConfig, StreamRun
from pretrain.masking.batch import Masked, mask_batch
from pretrain.train import build, inputs_of, masked_loss, new_optimizer
from shards.batches import Batch, in_order
from shards.shard_set import ShardSet
from training.config import RunConfig
from training.update import update

CPU = torch.device("cpu")
SIZE, IMAGES = 224, 512
MODEL: dict[str, Any] = {
    "embed_dim": 192,
    "depth": 4,
    "heads": 3,
    "decoder_dim": 128,
    "decoder_depth": 2,
    "decoder_heads": 4,
}
TOY: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 1,
    "heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
ENCODER, START_IMAGES = "random:vit_tiny_patch16_224", 32

Stepped = tuple[float, Tensor]
"""Loss and gradients of one update: a number, and all gradients end to end in fp32 on the CPU."""


def drawings(bench: Bench) -> Drawn:
    """The images that every section shares."""
    return drawn(bench.out, count=16 if bench.rehearse else IMAGES, size=SIZE, cores=bench.cores)


def first_batch(bench: Bench, count: int) -> Batch:
    with ShardSet.open(drawings(bench).shards) as shards, closing(in_order(shards, batch_size=count)) as batches:
        return next(batches)


def pretrain_config(bench: Bench, out: Path, precision: Any = "auto", **changes: Any) -> PretrainConfig:
    sizes: dict[str, Any] = TOY if bench.rehearse else MODEL
    settings: dict[str, Any] = {"batch_size": 8 if bench.rehearse else 32, "warmup_epochs": 0, "base_lr": 1e-3}
    run = StreamRun(out=out, device=bench.device, precision=precision)
    return PretrainConfig(data=str(drawings(bench).shards), run=run, **(sizes | settings | changes))


def masked_batch(bench: Bench, config: PretrainConfig, device: torch.device, progress: float = 0.5) -> Masked:
    with ShardSet.open(config.data) as shards:
        batch = first_batch(bench, config.batch_size)
        return mask_batch(inputs_of(batch, config, shards, device), progress)


def pretrain_step(bench: Bench, device: torch.device, precision: str) -> Stepped:
    config = pretrain_config(bench, bench.out, precision)
    model = build(config, SIZE).to(device)
    masked = masked_batch(bench, config, CPU)
    loss, _ = update(new_optimizer(model, config), [masked_loss(model, masked, config, device)])
    return loss.item(), gradients(model.parameters())


def learn_config(bench: Bench, out: Path, *, paper: bool, precision: Any = "auto") -> LearnConfig:
    return LearnConfig(
        images=str(drawings(bench).folder),
        encoder=ENCODER,
        grid=14,
        paper=paper,
        steps=2,
        crops=0,
        batch_size=4 if bench.rehearse else 16,
        run=RunConfig(out=out, device=bench.device, precision=precision),
    )


def learn_parts_step(bench: Bench, device: torch.device, precision: str, *, paper: bool) -> Stepped:
    """The learner starts where the CPU's does; the encoder looks on the device."""
    config = learn_config(bench, bench.out, paper=paper, precision=precision)
    encoder = load_encoder(ENCODER, grid=config.grid, device=device, precision=precision)
    learner = new_learner(config, encoder)
    learner.load_state_dict(_started(bench, paper).state_dict())
    learner.attention.prototypes.requires_grad_(not paper)
    learner.to(device)
    pixels = torch.from_numpy(first_batch(bench, config.batch_size).images).to(device)
    losses = [parts_loss(learner, config, encoder, TokenCrop(pixels, encoder(pixels)))[0]]
    loss, _ = update(learn_optimizer(learner, config), losses, largest_norm=PartLearning.largest_norm)
    return loss.item(), gradients(learner.parameters())


@cache
def _started(bench: Bench, paper: bool) -> PartLearner:
    """A learner at k-means centres of the CPU's tokens in fp32, or at its heads."""
    config = learn_config(bench, bench.out, paper=paper)
    encoder = load_encoder(ENCODER, grid=config.grid, precision="fp32")
    learner = new_learner(config, encoder)
    start(learner, config, encoder, TokenCrops(config, encoder, some_images(config.images, START_IMAGES)))
    return learner


def encoder_config(bench: Bench, out: Path, *, teacher: str | None = None, precision: Any = "auto") -> EncoderConfig:
    return EncoderConfig(
        images=str(drawings(bench).folder),
        teacher=teacher,
        size=112,
        local_size=48,
        local_crops=2,
        embed_dim=64 if bench.rehearse else 192,
        depth=1 if bench.rehearse else 4,
        heads=2,
        prototypes=128,
        epochs=1,
        warmup_epochs=0,
        batch_size=8 if bench.rehearse else 32,
        run=RunConfig(out=out, device=bench.device, precision=precision),
    )


def encoder_step(bench: Bench, device: torch.device, precision: str, *, teacher: str | None) -> Stepped:
    config = encoder_config(bench, bench.out, teacher=teacher, precision=precision)
    objective = new_objective(config, device)
    images = torch.from_numpy(first_batch(bench, config.batch_size).images).to(device)
    optimizer = encoder_optimizer(objective, config)
    told = objective.losses(images, step=0)
    loss, _ = update(optimizer, [told.of_class + told.of_patch], largest_norm=Distillation.largest_norm)
    return loss.item(), gradients(objective.parameters())


def gradients(weights: Iterable[nn.Parameter]) -> Tensor:
    """All of them end to end, in fp32 on the CPU."""
    return torch.cat([weight.grad.float().cpu().flatten() for weight in weights if weight.grad is not None])


def relative_error(theirs: Tensor, ours: Tensor) -> float:
    """‖theirs - ours‖ / ‖ours‖; NaN where either holds one."""
    return ((theirs - ours).norm() / ours.norm()).item()
