"""A small ViT from images alone, or from a larger one, for machines and domains without a ready encoder.

python -m pipeline encoder --images DIR --out runs/encoder
torchrun --nproc-per-node 8 -m -- pipeline encoder --images DIR --out runs/encoder
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from encoders.distill.config import EncoderConfig
from encoders.distill.from_teacher import FromTeacher
from encoders.distill.objective import Objective
from encoders.distill.self_distillation import StudentTeacher
from encoders.distill.student import vit_description
from encoders.frozen import CPU
from encoders.load import load_encoder
from encoders.monitor import Monitor
from shards.image_batches import ImageBatches
from shards.images import ImageList, list_images
from training import distributed
from training.device import pick_device, plain_attention_on_cpu
from training.loop import train
from training.metrics import last_figures
from training.run_folder import opened
from training.schedule import ends_period, learning_rate, warn_of_a_long_warmup
from training.task import Task

COLLAPSED = 0.02


def distill(config: EncoderConfig, *, stop_after_steps: int | None = None) -> dict[str, Any]:
    """Train the encoder into `config.run.out`; continues a half-done run, returns the report of a finished one.

    Under torchrun each rank takes its block of every batch, and the main one writes; the weights are those of one
    process on the whole batch.

    Args:
        stop_after_steps: Stop, with a checkpoint, when this many steps are done in all, as a kill would.

    Raises:
        ValueError: The images make no batch, the ranks cannot share one, or --teacher or --knn do not fit.
        FloatingPointError: See `training.loop.train`.
    """
    with opened(config) as run:
        if run.finished:
            return run.report()
        task = Distillation(config, list_images(config.images), run.path)
        return train(task, run, config.run, total=task.total, stop_after_steps=stop_after_steps)


def new_objective(config: EncoderConfig, device: torch.device = CPU) -> Objective:
    """What is trained, on the device, its weights drawn from the seed."""
    teacher = None
    if config.teacher is not None:
        teacher = load_encoder(
            config.teacher,
            size=config.size if config.teacher_blocks else None,
            grid=None if config.teacher_blocks else config.size // config.patch,
            mean=config.encoder_mean,
            std=config.encoder_std,
            device=device,
            precision=config.run.precision,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        objective = StudentTeacher(config) if teacher is None else FromTeacher(config, teacher)
    return objective.to(device)


class Distillation(Task):
    """A small ViT and what it learns from."""

    name = "encoder"
    largest_norm = 3.0
    shown = ("loss", "knn")

    def __init__(self, config: EncoderConfig, images: ImageList, run: Path):
        self.config, self.images, self.run = config, images, run
        self.batch_size, count = config.batch_size, len(images.images)
        self.total = config.epochs * count // config.batch_size
        if config.epochs and not self.total:
            raise ValueError(
                f"{config.epochs} epochs of {count} images make no batch of {config.batch_size}; "
                "lower --batch-size or raise --epochs"
            )
        self.warmup_steps = round(config.warmup_epochs * self.total / max(1, config.epochs))
        warn_of_a_long_warmup(self.warmup_steps, self.total)
        self.device = pick_device(config.run.device)
        self.objective = new_objective(config, self.device)
        plain_attention_on_cpu(self.objective, self.device)
        self.optimizer = new_optimizer(self.objective, config)
        self.warned = False
        self.monitor = None
        if config.knn is not None and distributed.is_main():
            self.monitor = Monitor(config.knn, size=config.size, threads=config.run.threads)

    def rate(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self.config.base_lr * self.batch_size / 256,
            warmup_steps=self.warmup_steps,
            total_steps=self.total,
            final=1e-6,
        )

    def read(self, step: int) -> None:
        self.batch, _ = next(self.steps)

    def losses(self, step: int) -> Iterator[Float[Tensor, ""]]:
        """One micro-batch: the head's batch norm is over the whole batch."""
        told = self.objective.losses(self.batch.to(self.device, non_blocking=True), step=step)
        yield told.of_class + told.of_patch
        # No DDP: its reductions would meet those of the head's batch norm.
        distributed.average_gradients(weight for group in self.optimizer.param_groups for weight in group["params"])
        # On its way while the gradient's norm is computed; the loop waits for that, so `figures` waits for nothing.
        mine = distributed.mean_over_ranks(torch.stack([told.of_class, told.of_patch]).detach())
        self.named = ("loss_class", "loss_patch", *told.shown)
        self.values = torch.stack([*mine, *told.shown.values()]).to("cpu", non_blocking=True)

    def accept(self, step: int) -> None:
        self.objective.follow(step / self.total)

    def figures(self, step: int) -> dict[str, float]:
        figures = dict(zip(self.named, self.values.tolist(), strict=True))
        images = self.config.knn_epochs * len(self.images.images)
        every = ends_period(step, images=images, batch_size=self.batch_size)
        if self.monitor and (step == self.total - 1 or every):
            encoder, precision = self.objective.encoder, self.config.run.precision
            figures["knn"] = self.monitor(encoder, precision, self.objective.mean, self.objective.std)
        if step == self.total - 1:
            figures["unreadable"] = self._unreadable()
        self._warn_of_collapse(figures, step)
        return figures

    def tensors(self) -> dict[str, Tensor]:
        return self.objective.encoder.state_dict()

    def metadata(self) -> dict[str, Any]:
        vit = {
            **vit_description(self.objective.encoder, self.config.size),
            "mean": list(self.objective.mean),
            "std": list(self.objective.std),
            "source": "encoder",
        }
        return {"vit": vit}

    def state(self, step: int) -> dict[str, Any]:
        inside = f"{self.objective.saved}."
        return {"rest": {name: one for name, one in self.objective.state_dict().items() if not name.startswith(inside)}}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        encoder = {f"{self.objective.saved}.{name}": tensor for name, tensor in tensors.items()}
        self.objective.load_state_dict(state["rest"] | encoder)

    def open(self, step: int) -> None:
        self._warn_of_collapse(last_figures(self.run, step=step), step - 1)
        self.batches = ImageBatches(
            self.images,
            size=self.objective.image_size,
            batch_size=self.batch_size,
            seed=self.config.seed,
            step=step,
            threads=self.config.run.threads,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        self.steps = iter(self.batches)

    def close(self) -> None:
        self.batches.close()

    def report(self, step: int) -> dict[str, Any]:
        return {"verb": "encoder", "images": len(self.images.images), "images_digest": self.images.digest}

    def _unreadable(self) -> int:
        """Images that any rank found unreadable."""
        found = torch.zeros(len(self.images.images), device=self.device)
        found[list(self.batches.unreadable)] = 1
        return int((distributed.mean_over_ranks(found) > 0).sum())

    def _warn_of_collapse(self, figures: dict[str, float], step: int) -> None:
        """Once a process."""
        collapsed = step + 1 > self.total / 4 and figures.get("told_apart", 1.0) < COLLAPSED
        if collapsed and not self.warned and distributed.is_main():
            remedy = "" if self.config.teacher else " or a higher --teacher-momentum"
            print(
                f"the encoder says the same of every image at step {step + 1} (collapse); "
                f"start again with a lower --base-lr{remedy}",
                file=sys.stderr,
            )
        self.warned |= collapsed


def new_optimizer(objective: Objective, config: EncoderConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; biases, norms, positions, class and mask token do not decay."""
    trained = [(name, weight) for name, weight in objective.named_parameters() if weight.requires_grad]
    flat = [weight for name, weight in trained if weight.ndim < 2 or name.endswith(("pos_embed", "cls_token"))]
    kept = {id(weight) for weight in flat}
    decayed = [weight for _, weight in trained if id(weight) not in kept]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0)
