"""Does everything run? The step of every stage against the CPU's, masks bit for bit, resume, one rank, whole verbs."""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.on_gpu import against_cpu
from benchmarks.on_gpu.against_cpu import CPU, SIZE, Stepped, drawings, first_batch, relative_error
from benchmarks.on_gpu.case import Bars, Bench, Case
from benchmarks.on_gpu.drawn import source_of
from benchmarks.rounds import Row, exact
from encoders.distill.train import distill
from evaluate.config import KnnConfig, ProbeConfig
from evaluate.knn import knn
from evaluate.linear import probe
from evaluate.parts.score import score_labellers
from evaluate.parts.views import TruthSet
from partlearn.config import ExtractConfig
from partlearn.labelling.learned import open_token_labeller
from partlearn.labelling.shard import build_shard
from partlearn.train import learn
from pretrain.masking.strategies import OF_ATTENTION, STRATEGIES
from pretrain.train import build, masked_loss, new_optimizer, pretrain
from training import checkpoint
from training.config import RunConfig
from training.update import update

BARS: Bars = {
    "loss_error_fp32": ("<=", 1e-4),
    "loss_error_bf16": ("<=", 2e-2),
    "gradient_error_fp32": ("<=", 1e-2),
    "gradient_error_bf16": ("<=", 2e-1),
    "labels_agree_fp32": (">=", 0.99),
    "labels_agree_bf16": (">=", 0.95),
    "equal_masks": (">=", 1.0),
    "resumed_error": ("<=", 1e-3),
    "one_rank_loss_error": ("<=", 1e-5),
    "one_rank_gradient_error": ("<=", 1e-3),
    "finished": (">=", 1.0),
}
"""Relative errors against fp32 on the CPU, and shares. What is wired wrongly is off by far more."""
STEPS = 6


def cases(bench: Bench) -> list[Case]:
    """Numbers against the CPU first; then a resumed run, verbs from end to end, and a rank, which alone may hang."""
    stages: dict[str, Callable[[torch.device, str], Stepped]] = {
        "pretrain": partial(against_cpu.pretrain_step, bench),
        "learn-parts": partial(against_cpu.learn_parts_step, bench, paper=False),
        "learn-parts --paper": partial(against_cpu.learn_parts_step, bench, paper=True),
        "encoder": partial(against_cpu.encoder_step, bench, teacher=None),
        "encoder --teacher": partial(against_cpu.encoder_step, bench, teacher=against_cpu.ENCODER),
    }
    verbs: dict[str, Callable[[Bench, Path], None]] = {
        "encoder": _encoder,
        "learn-parts": _learn_parts,
        "extract": _extract,
        "pretrain, knn and probe": _pretrain,
        "score-parts": _score_parts,
    }
    return [
        *(Case(f"a step of {name}", partial(_against_cpu, bench, stepped)) for name, stepped in stages.items()),
        Case("masks", partial(_masks, bench)),
        Case("labels", partial(_labels, bench)),
        Case("resume", partial(_resume, bench)),
        *(Case(f"all of {name}", partial(_verb, bench, verb)) for name, verb in verbs.items()),
        Case("one rank", partial(_one_rank, bench)),
    ]


def _against_cpu(bench: Bench, stepped: Callable[[torch.device, str], Stepped]) -> Iterator[Row]:
    """Relative errors of loss and gradients on the device, in fp32 and in bf16. cuDNN's convolutions are
    told not to compute fp32 in TF32, their default."""
    torch.backends.cudnn.allow_tf32 = False
    loss, gradients = stepped(CPU, "fp32")
    for precision in ("fp32", "bf16"):
        their_loss, their_gradients = stepped(torch.device(bench.device), precision)
        yield exact(f"loss_error_{precision}", abs(their_loss - loss) / abs(loss), "relative", 1)
        yield exact(f"gradient_error_{precision}", relative_error(their_gradients, gradients), "relative", 1)


def _masks(bench: Bench) -> Iterator[Row]:
    """The share of masks that are the CPU's bit for bit, visible and masked patches in their order."""
    equal: list[bool] = []
    for masking in sorted(set(STRATEGIES) - set(OF_ATTENTION)):  # the drawings have no attention
        for patch, keep_share in ((16, 1.0), (8, 0.25)):
            config = against_cpu.pretrain_config(bench, bench.out, masking=masking, patch=patch, keep_share=keep_share)
            for alpha in (0.0, 0.3, 0.5, 1.0) if masking == "semmae" else (0.5,):  # the others do not change
                ours = against_cpu.masked_batch(bench, config, CPU, alpha)
                theirs = against_cpu.masked_batch(bench, config, torch.device(bench.device), alpha)
                for name in ("ids_visible", "ids_masked"):
                    equal += (getattr(ours, name) == getattr(theirs, name).cpu()).all(dim=1).tolist()
    yield exact("equal_masks", float(np.mean(equal)), "share", len(equal))


def _labels(bench: Bench) -> Iterator[Row]:
    """The share of cells that have the CPU's label, by the parts that come with the project."""
    images = first_batch(bench, 4 if bench.rehearse else 32).images
    ours = open_token_labeller("builtin", precision="fp32")(images)
    for precision in ("fp32", "bf16"):
        theirs = open_token_labeller("builtin", device=torch.device(bench.device), precision=precision)(images)
        yield exact(f"labels_agree_{precision}", float((theirs.parts == ours.parts).mean()), "share", len(images))


def _resume(bench: Bench) -> Iterator[Row]:
    """A pretraining that stopped half-way and went on, against one that did not; and that one against its own
    repetition, because some kernels of a GPU add in any order."""
    weights = []
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        for name, stops in (("straight", (STEPS,)), ("again", (STEPS,)), ("resumed", (STEPS // 2, STEPS))):
            config = against_cpu.pretrain_config(bench, Path(folder) / name, "fp32", epochs=10)
            for stop in stops:
                pretrain(config, stop_after_steps=stop)
            tensors = checkpoint.load_tensors(checkpoint.find(config.run.out))[0]
            weights.append(torch.cat([tensor.float().flatten() for tensor in tensors.values()]))
    straight, again, resumed = weights
    yield exact("resumed_error", relative_error(resumed, straight), "relative", 1)
    yield exact("repeated_error", relative_error(again, straight), "relative", 1)


def _one_rank(bench: Bench) -> Iterator[Row]:
    """A step under DistributedDataParallel in a group of one, over NCCL (gloo on a CPU), against a plain one."""
    config, device = against_cpu.pretrain_config(bench, bench.out, "fp32"), torch.device(bench.device)
    masked = against_cpu.masked_batch(bench, config, CPU)
    dist.init_process_group("nccl" if bench.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        losses, gradients = [], []
        for wrapped in (False, True):
            model = build(config, SIZE).to(device)
            stepped: torch.nn.Module = model
            if wrapped:
                stepped = DistributedDataParallel(model, device_ids=[0] if bench.device == "cuda" else None)
            optimizer = new_optimizer(model, config)
            losses.append(update(optimizer, [masked_loss(stepped, masked, config, device)])[0].item())
            gradients.append(against_cpu.gradients(model.parameters()))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    yield exact("one_rank_loss_error", abs(losses[1] - losses[0]) / abs(losses[0]), "relative", 1)
    yield exact("one_rank_gradient_error", relative_error(gradients[1], gradients[0]), "relative", 1)


def _verb(bench: Bench, verb: Callable[[Bench, Path], None]) -> Iterator[Row]:
    """It ends; and how long it took, first-time costs of the device included."""
    drawings(bench)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        verb(bench, Path(folder) / "run")
    yield exact("finished", 1.0, "1 is yes", 1)
    yield exact("seconds", time.perf_counter() - began, "s", 1)


def _encoder(bench: Bench, out: Path) -> None:
    distill(against_cpu.encoder_config(bench, out))


def _learn_parts(bench: Bench, out: Path) -> None:
    learn(against_cpu.learn_config(bench, out, paper=False))


def _extract(bench: Bench, out: Path) -> None:
    """One shard, as every actor of `extract` builds it."""
    config = ExtractConfig(
        images=str(drawings(bench).folder),
        samples_per_shard=64,
        run=RunConfig(out=out, device=bench.device, threads=bench.cores),
    )
    out.mkdir()
    labeller = open_token_labeller(config.parts, device=torch.device(bench.device))
    build_shard(source_of(config).slice(0), labeller=labeller, config=config, plan_digest="bench")


def _pretrain(bench: Bench, out: Path) -> None:
    config = against_cpu.pretrain_config(bench, out, epochs=1)
    pretrain(config)
    frozen: dict[str, Any] = {"checkpoint": str(out), "data": config.data, "pool": "mean", "device": bench.device}
    knn(KnnConfig(**frozen))
    probe(ProbeConfig(epochs=2, **frozen))


def _score_parts(bench: Bench, out: Path) -> None:
    """On eight drawings: most of its time is the CPU's, and not the question."""
    source = drawings(bench).folder
    for what in ("images", "labels"):
        (out / what).mkdir(parents=True)
        for file in sorted((source / what).glob("*/*"))[:8]:
            (out / what / file.name).write_bytes(file.read_bytes())
    labeller = open_token_labeller("builtin", device=torch.device(bench.device))
    score_labellers([labeller], TruthSet(out), size=SIZE, advance=lambda count: None)
