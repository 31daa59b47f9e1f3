"""A small ViT from pictures alone: DINO + iBOT self-distillation, for machines and domains without a ready encoder.

python -m pipeline encoder --images DIR --out runs/encoder
"""

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from partlearn.block_masks import block_masks
from partlearn.config import EncoderConfig
from partlearn.encoders import IMAGENET_MEAN, IMAGENET_STD
from partlearn.student_teacher import Losses, StudentTeacher
from partlearn.views import PictureBatches, crop, jitter_colour, random_boxes
from shards.pictures import list_pictures
from training import checkpoint
from training.device import autocast, pick_device, plain_attention_on_cpu
from training.metrics import Metrics
from training.progress import Progress
from training.run import RunFolder
from training.schedule import cosine, learning_rate

GLOBAL_SCALE, LOCAL_SCALE = (0.35, 1.0), (0.08, 0.35)
GLOBAL_CROPS = 2
JITTER = 0.4
GRADIENT_NORM = 3.0
COLLAPSED = 0.02


@dataclass(frozen=True, slots=True)
class Crops:
    """What one step shows: crop after crop of the whole batch."""

    global_crops: Float[Tensor, "global_crops 3 size size"]
    local_crops: Float[Tensor, "local_crops 3 local_size local_size"]
    masks: Bool[Tensor, "global_crops patches"]


def distill(config: EncoderConfig, *, stop_after_steps: int | None = None) -> dict[str, Any]:
    """Train the encoder into `config.run.out`; continues a half-done run, returns the report of a finished one.

    Args:
        stop_after_steps: Stop, with a checkpoint, when this many steps are done in all, as a kill would.
    """
    pictures = list_pictures(config.images)
    with RunFolder.open(config) as run:
        if run.finished:
            return run.report()
        device = pick_device(config.run.device)
        total = config.epochs * len(pictures.pictures) // config.batch_size
        if config.epochs and not total:
            raise ValueError(
                f"{config.epochs} epochs of {len(pictures.pictures)} pictures make no batch of {config.batch_size}; "
                "lower --batch-size or raise --epochs"
            )
        pair = new_pair(config).to(device)
        plain_attention_on_cpu(pair, device)
        optimizer = new_optimizer(pair, config)
        step = _resume(run, pair, optimizer, config)
        last = min(total, total if stop_after_steps is None else stop_after_steps)
        metrics, progress = Metrics(run.path, step=step), Progress(total, "encoder", "steps", done=step)
        batches = PictureBatches(
            pictures,
            size=config.size,
            batch_size=config.batch_size,
            seed=config.seed,
            step=step,
            threads=config.run.threads,
        )
        began = saved = time.monotonic()
        first, shown, warned = step, {}, False
        try:
            for images, _ in batches if step < last else ():
                crops = draw_crops(images.to(device), config, step=step)
                shown = train_step(pair, optimizer, crops, config, step=step, total=total)
                step += 1
                speed = (step - first) * config.batch_size / (time.monotonic() - began)
                metrics.log(step - 1, **shown, images_per_second=speed)
                progress.advance(loss=shown["loss_class"] + shown["loss_patch"])
                if not warned and step > total / 4 and shown["told_apart"] < COLLAPSED:
                    warned = True
                    print(
                        f"the teacher says the same of every picture at step {step} (collapse); "
                        "start again with a lower --base-lr or a higher --teacher-momentum",
                        file=sys.stderr,
                    )
                if not all(math.isfinite(value) for value in shown.values()):
                    raise FloatingPointError(
                        f"the loss is not finite at step {step}; start again with a lower --base-lr"
                    )
                if step >= last:
                    break
                if time.monotonic() - saved > 60 * config.run.checkpoint_minutes:
                    _save(run, step, pair, optimizer, config)
                    saved = time.monotonic()
            _save(run, step, pair, optimizer, config)
        finally:
            batches.close()
            progress.close()
            metrics.close()
        report = {
            "verb": "encoder",
            "steps": step,
            "pictures": len(pictures.pictures),
            "unreadable": len(batches.unreadable),
        }
        report |= {"pictures_digest": pictures.digest, "seconds": round(time.monotonic() - began, 1), **shown}
        if step == total:
            run.finish(report)
        return report


def new_pair(config: EncoderConfig) -> StudentTeacher:
    """Student and teacher with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return StudentTeacher(
            size=config.size,
            patch=config.patch,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            prototypes=config.prototypes,
        )


def new_optimizer(pair: StudentTeacher, config: EncoderConfig) -> torch.optim.AdamW:
    """AdamW over the student; biases, norms, positions, class and mask token do not decay."""
    trained = [(name, weight) for name, weight in pair.named_parameters() if weight.requires_grad]
    flat = [weight for name, weight in trained if weight.ndim < 2 or name.endswith(("pos_embed", "cls_token"))]
    kept = {id(weight) for weight in flat}
    decayed = [weight for _, weight in trained if id(weight) not in kept]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0)


def draw_crops(images: UInt8[Tensor, "batch height width 3"], config: EncoderConfig, *, step: int) -> Crops:
    """The views of one step, a pure function of the pictures, the seed and the step."""
    generator = step_generator(config.seed, step)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (pixels.new_tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def views(count: int, size: int, scale: tuple[float, float]) -> Float[Tensor, "crops 3 size size"]:
        drawn = [pixels.new_empty(0, 3, size, size)]
        for _ in range(count):
            boxes = random_boxes(len(pixels), scale=scale, generator=generator).to(pixels.device)
            flip = (torch.rand(len(pixels), generator=generator) < 0.5).to(pixels.device)
            view = jitter_colour(crop(pixels, boxes, size, flip), strength=JITTER, generator=generator)
            drawn.append((view - mean) / std)
        return torch.cat(drawn)

    return Crops(
        views(GLOBAL_CROPS, config.size, GLOBAL_SCALE),
        views(config.local_crops, config.local_size, LOCAL_SCALE),
        block_masks(
            GLOBAL_CROPS * len(pixels),
            config.size // config.patch,
            share=config.mask_share,
            generator=generator,
        ).to(pixels.device),
    )


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator for one step; the pair is hashed, because torch's CPU generator reads 32 bits of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


def train_step(
    pair: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    crops: Crops,
    config: EncoderConfig,
    *,
    step: int,
    total: int,
) -> dict[str, float]:
    """One update of the student, then of the teacher; returns what the log shows."""
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
    with autocast(crops.global_crops.device, config.run.precision):
        losses: Losses = pair.losses(
            crops.global_crops,
            crops.local_crops,
            crops.masks,
            batch=len(crops.global_crops) // GLOBAL_CROPS,
        )
    optimizer.zero_grad()
    (losses.of_class + losses.of_patch).backward()
    norm = nn.utils.clip_grad_norm_([w for group in optimizer.param_groups for w in group["params"]], GRADIENT_NORM)
    optimizer.step()
    pair.follow(cosine(config.teacher_momentum, 1.0, step / total))
    shown = {"loss_class": losses.of_class.item(), "loss_patch": losses.of_patch.item(), **losses.shown}
    return shown | {"lr": rate, "gradient_norm": norm.item()}


def _save(
    run: RunFolder, step: int, pair: StudentTeacher, optimizer: torch.optim.Optimizer, config: EncoderConfig
) -> None:
    """The teacher's backbone as the model, everything else as state."""
    vit = {
        "img_size": config.size,
        "patch_size": config.patch,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "source": "encoder",
    }
    rest = {name: tensor for name, tensor in pair.state_dict().items() if not name.startswith("teacher.")}
    checkpoint.save(
        run.path,
        step,
        pair.teacher.state_dict(),
        metadata={"vit": vit},
        state={"pair": rest, "optimizer": optimizer.state_dict()},
    )


def _resume(run: RunFolder, pair: StudentTeacher, optimizer: torch.optim.Optimizer, config: EncoderConfig) -> int:
    """Continue from the run's newest checkpoint; returns the steps done."""
    newest = checkpoint.newest(run.path)
    if newest is None:
        return 0
    teacher, _ = checkpoint.load_tensors(newest / "model.safetensors")
    state = checkpoint.load_state(newest)
    pair.load_state_dict(state["pair"] | {f"teacher.{name}": tensor for name, tensor in teacher.items()})
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
