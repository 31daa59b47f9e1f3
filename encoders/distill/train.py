"""A small ViT from images alone, or from a larger one, for machines and domains without a ready encoder.

python -m pipeline encoder --images DIR --out runs/encoder
torchrun --nproc-per-node 8 -m -- pipeline encoder --images DIR --out runs/encoder
"""

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from encoders.distill.config import EncoderConfig
from encoders.distill.from_teacher import FromTeacher
from encoders.distill.monitor import Monitor
from encoders.distill.objective import Objective
from encoders.distill.self_distillation import StudentTeacher
from encoders.distill.student import vit_description
from encoders.frozen import CPU
from encoders.load import load_encoder
from shards.image_batches import ImageBatches
from shards.images import ImageList, list_images
from training import checkpoint, distributed
from training.device import pick_device, plain_attention_on_cpu
from training.metrics import Metrics, last_figures
from training.progress import Progress
from training.run_folder import RunFolder
from training.schedule import learning_rate

GRADIENT_NORM = 3.0

COLLAPSED = 0.02


def distill(config: EncoderConfig, *, stop_after_steps: int | None = None) -> dict[str, Any]:
    """Train the encoder into `config.run.out`; continues a half-done run, returns the report of a finished one.

    Under torchrun each rank takes its block of every batch, and the main one writes; the weights are those of one
    process on the whole batch.

    Args:
        stop_after_steps: Stop, with a checkpoint, when this many steps are done in all, as a kill would.

    Raises:
        ValueError: The images make no batch, the ranks cannot share one, or --teacher or --knn do not fit.
        FloatingPointError: The loss is no longer finite; the checkpoints before it are left whole.
    """
    joined = distributed.join(config.run.device)
    try:
        ranks = distributed.world_size()
        if config.batch_size % ranks:
            raise ValueError(f"--batch-size {config.batch_size} cannot be shared by {ranks} ranks; choose a multiple")
        images = list_images(config.images)
        with RunFolder.open(config) as run:
            distributed.barrier()
            if run.finished:
                return run.report()
            return _train(config, run, images, stop_after_steps)
    finally:
        if joined:
            distributed.leave()


def new_objective(config: EncoderConfig, device: torch.device = CPU) -> Objective:
    """What is trained, on the device, its weights drawn from the seed."""
    teacher = None
    if config.teacher is not None:
        at = {"size": config.size} if config.teacher_blocks else {"grid": config.size // config.patch}
        teacher = load_encoder(config.teacher, **at, device=device, precision=config.run.precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        objective = StudentTeacher(config) if teacher is None else FromTeacher(config, teacher)
    return objective.to(device)


def _train(config: EncoderConfig, run: RunFolder, listed: ImageList, stop_after_steps: int | None) -> dict[str, Any]:
    count = len(listed.images)
    total = config.epochs * count // config.batch_size
    if config.epochs and not total:
        raise ValueError(
            f"{config.epochs} epochs of {count} images make no batch of {config.batch_size}; "
            "lower --batch-size or raise --epochs"
        )
    device = pick_device(config.run.device)
    objective = new_objective(config, device)
    plain_attention_on_cpu(objective, device)
    optimizer = new_optimizer(objective, config)
    monitor = None
    if config.knn is not None and distributed.is_main():
        monitor = Monitor(config.knn, size=config.size, threads=config.run.threads)
    step = resume(run.path, objective, optimizer)
    last = min(total, total if stop_after_steps is None else stop_after_steps)
    metrics, progress = Metrics(run.path, step=step), Progress(total, "encoder", "steps", done=step)
    batches = ImageBatches(
        listed,
        size=objective.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        step=step,
        threads=config.run.threads,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    clock, began = checkpoint.Clock(config.run.checkpoint_minutes), time.monotonic()
    first, shown, measured = step, last_figures(run.path, step=step), {}
    shown.pop("images_per_second", None)
    warned = _warn_of_collapse(config, shown, step=step, total=total)
    try:
        for images, _ in batches if step < last else ():
            shown = train_step(objective, optimizer, images.to(device), config, step=step, total=total)
            step += 1
            if monitor and (step == total or _ends_period(step, config, count)):
                measured = {"knn": monitor(objective.encoder, config.run.precision, objective.mean, objective.std)}
                shown |= measured
            if step == last:
                shown["unreadable"] = _unreadable(batches, count, device)
            speed = (step - first) * config.batch_size / (time.monotonic() - began)
            metrics.log(step - 1, **shown, images_per_second=speed)
            progress.advance(loss=shown["loss_class"] + shown["loss_patch"], **measured)
            warned = warned or _warn_of_collapse(config, shown, step=step, total=total)
            if not all(math.isfinite(value) for value in shown.values()):
                raise FloatingPointError(f"the loss is not finite at step {step}; start again with a lower --base-lr")
            if step >= last:
                break
            if clock.due():
                save(run.path, step, objective, optimizer, config)
        save(run.path, step, objective, optimizer, config)
    finally:
        batches.close()
        progress.close()
        metrics.close()
    report = {
        "verb": "encoder",
        "steps": step,
        "images": count,
        "unreadable": int(shown.pop("unreadable", 0)),
        "images_digest": listed.digest,
        "seconds": round(time.monotonic() - began, 1),
        **shown,
    }
    if step == total:
        run.finish(report)
    distributed.barrier()
    return report


def _ends_period(step: int, config: EncoderConfig, images: int) -> bool:
    """Whether step number `step` (from 1) completes another `knn_epochs`."""
    period = config.knn_epochs * images
    return step * config.batch_size // period > (step - 1) * config.batch_size // period


def _warn_of_collapse(config: EncoderConfig, shown: dict[str, float], *, step: int, total: int) -> bool:
    """Whether there was reason to."""
    collapsed = step > total / 4 and shown.get("told_apart", 1.0) < COLLAPSED
    if collapsed and distributed.is_main():
        remedy = "" if config.teacher else " or a higher --teacher-momentum"
        print(
            f"the encoder says the same of every image at step {step} (collapse); "
            f"start again with a lower --base-lr{remedy}",
            file=sys.stderr,
        )
    return collapsed


def _unreadable(batches: ImageBatches, count: int, device: torch.device) -> int:
    """Images that any rank found unreadable."""
    found = torch.zeros(count, device=device)
    found[list(batches.unreadable)] = 1
    return int((distributed.mean_over_ranks(found) > 0).sum())


def new_optimizer(objective: Objective, config: EncoderConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; biases, norms, positions, class and mask token do not decay."""
    trained = [(name, weight) for name, weight in objective.named_parameters() if weight.requires_grad]
    flat = [weight for name, weight in trained if weight.ndim < 2 or name.endswith(("pos_embed", "cls_token"))]
    kept = {id(weight) for weight in flat}
    decayed = [weight for _, weight in trained if id(weight) not in kept]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0)


def train_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    images: UInt8[Tensor, "batch height width 3"],
    config: EncoderConfig,
    *,
    step: int,
    total: int,
) -> dict[str, float]:
    """One update from this rank's block of the batch; returns what the log shows, of the whole batch."""
    per_epoch = total / config.epochs
    rate = learning_rate(
        step,
        peak=config.base_lr * config.batch_size / 256,
        warmup_steps=round(config.warmup_epochs * per_epoch),
        total_steps=total,
        final=1e-6,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    losses = objective.losses(images, step=step)
    optimizer.zero_grad()
    (losses.of_class + losses.of_patch).backward()
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    distributed.average_gradients(trained)  # no DDP: its reductions would meet those of the head's batch norm
    norm = nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
    optimizer.step()
    objective.follow(step / total)
    of_class, of_patch = distributed.mean_over_ranks(torch.stack([losses.of_class, losses.of_patch])).tolist()
    shown = {"loss_class": of_class, "loss_patch": of_patch, **losses.shown}
    return shown | {"lr": rate, "gradient_norm": norm.item()}


def save(run: Path, step: int, objective: Objective, optimizer: torch.optim.Optimizer, config: EncoderConfig) -> None:
    """Write a checkpoint, on the main rank."""
    if not distributed.is_main():
        return
    vit = {
        **vit_description(objective.encoder, config.size),
        "mean": list(objective.mean),
        "std": list(objective.std),
        "source": "encoder",
    }
    inside = f"{objective.saved}."
    rest = {name: value for name, value in objective.state_dict().items() if not name.startswith(inside)}
    checkpoint.save(
        run,
        step,
        objective.encoder.state_dict(),
        metadata={"vit": vit},
        state={"rest": rest, "optimizer": optimizer.state_dict()},
    )


def resume(run: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> int:
    """Continue from the run's newest checkpoint; returns the steps done."""
    newest = checkpoint.newest(run)
    if newest is None:
        return 0
    encoder, _ = checkpoint.load_tensors(newest / "model.safetensors")
    state = checkpoint.load_state(newest)
    objective.load_state_dict(state["rest"] | {f"{objective.saved}.{name}": each for name, each in encoder.items()})
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
