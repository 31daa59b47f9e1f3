"""The verb `pretrain`: one process, torchrun's ranks or Ray Train's workers, from the same function."""

import math
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.config import PretrainConfig
from pretrain.health import Health
from pretrain.initialise import initialise
from pretrain.mae import MAE
from pretrain.masking.batch import Masked
from pretrain.masking.config import MaskingConfig
from pretrain.masking.inputs import CPU, Inputs
from pretrain.masking.refusals import refuse_what_does_not_fit
from pretrain.masking.semmae import alpha_at
from pretrain.masking.strategies import OF_ATTENTION
from pretrain.memory import images_at_once
from pretrain.objective import Objective, new_masking
from pretrain.pictures import draw_pictures
from shards.batches import Batch
from shards.shard_set import ShardSet
from shards.stream import Stream
from training import checkpoint, distributed
from training.augment import IMAGENET_MEAN, IMAGENET_STD, normalised, unit
from training.contact_sheet import ROWS
from training.device import autocast, computes_bf16, pick_device, plain_attention_on_cpu
from training.loop import train
from training.memory import asking_for_less
from training.parallel import gradients_stay_here, on_ranks
from training.run_folder import opened
from training.schedule import ends_period, learning_rate, warn_of_a_long_warmup
from training.task import Task

LOG_EVERY = 10


def pretrain(config: PretrainConfig, *, stop_after_steps: int | None = None) -> dict[str, Any]:
    """Train a masked autoencoder into `config.run.out` and return its report.

    A finished run is returned as it is, a half one goes on from its newest checkpoint at the exact sample; so does a
    finished one whose `epochs` are raised. `stop_after_steps` ends early, as a kill would, after writing a checkpoint.

    Raises:
        ValueError: The shards do not fit the settings, or lack what the masking reads: parts, or class attention.
        ShardError: The shard set is unfinished or damaged.
        FloatingPointError: See `training.loop.train`.
        OutOfMemory: A step needs more than there is; a smaller `run.micro_batch` needs less.
    """
    with opened(config, raisable=("epochs",)) as run:
        if run.finished:
            return run.report()
        with opened_shards(config) as shards:
            task = Pretraining(config, shards)
            if run.before and run.before["epochs"]:
                task.tell_of_more_epochs(run.before["epochs"])
            at_once = task.micro_batch or config.batch_size // distributed.world_size()
            with asking_for_less("--micro-batch", at_once, free=True):
                return train(task, run, config.run, total=task.total, stop_after_steps=stop_after_steps)


def opened_shards(config: PretrainConfig) -> ShardSet:
    """The shard set of a config, with its labels and its cache. See `ShardSet.open`."""
    cache_bytes = int(config.run.cache_gb * 1e9)
    return ShardSet.open(config.data, labels=config.labels, cache=config.run.cache, cache_bytes=cache_bytes)


def build(config: PretrainConfig, size: int) -> MAE:
    """The model of a config, its weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MAE(
            size=size,
            patch=config.patch,
            embed_dim=config.embed_dim,
            depth=config.depth,
            heads=config.heads,
            decoder_dim=config.decoder_dim,
            decoder_depth=config.decoder_depth,
            decoder_heads=config.decoder_heads,
            norm_pix_loss=config.norm_pix_loss,
        )


class Pretraining(Task):
    """A masked autoencoder, the stream that feeds it, and the masks between them."""

    log_every = LOG_EVERY
    shown = ("loss", "lr", "alpha", "purity", "effective_rank", "feature_std", "knn")

    def __init__(self, config: PretrainConfig, shards: ShardSet):
        refuse_what_does_not_fit(config, shards)
        self.config, self.shards = config, shards
        self.name, self.batch_size = f"pretrain {config.masking}", config.batch_size
        self.keep_last = config.run.keep_last
        self.total = self._steps_of(config.epochs)
        self.warmup_steps = round(config.warmup_epochs * len(shards) / config.batch_size)
        warn_of_a_long_warmup(self.warmup_steps, self.total)
        self.device = pick_device(config.run.device)
        if self.device.type == "cuda":
            torch.set_num_threads(1)  # the stream's threads crop with torch; the rest of the work is the device's
        self.model = build(config, shards.size)
        if config.init and checkpoint.newest(config.run.out) is None:  # a run that goes on has weights of its own
            told = initialise(self.model, config.init)
            if distributed.is_main():
                print(told, file=sys.stderr)
        self.masking = new_masking(config, self.model, shards.heads)
        self.objective = Objective(self.model, self.masking).to(self.device)
        plain_attention_on_cpu(self.objective, self.device)
        self.wrapped = on_ranks(self.objective, self.device)
        self.micro_batch = config.run.micro_batch or _what_fits(config, shards.size, self.device)
        self.optimizer = new_optimizer(self.objective, config)
        self.stream = Stream(
            shards,
            batch_size=config.batch_size,
            seed=config.seed,
            window=config.window,
            flip=config.flip,
            crop_scale=config.crop_scale,
            attention=config.masking in OF_ATTENTION,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            threads=config.run.threads,
            substitutes=config.substitutes,
        )
        self.health = Health(config, self.stream, total=self.total)

    def rate(self, step: int) -> float:
        return self._rate(step, self.total)

    def _rate(self, step: int, total: int) -> float:
        peak = self.config.base_lr * self.batch_size / 256
        return learning_rate(step, peak=peak, warmup_steps=self.warmup_steps, total_steps=total)

    def _steps_of(self, epochs: int) -> int:
        return math.ceil(epochs * len(self.shards) / self.batch_size)

    def read(self, step: int) -> None:
        self.batch = next(self.batches)

    def losses(self, step: int) -> Iterator[Float[Tensor, ""]]:
        """MAE's loss is a mean over images, each with as many masked patches: a micro-batch weighs as its images do."""
        self.masked = self.mask(self.batch, step)
        pieces = self.masked.pieces(self.micro_batch)
        for number, piece in enumerate(pieces, start=1):
            with gradients_stay_here(self.wrapped, where=number < len(pieces)):
                loss = masked_loss(self.wrapped, piece, self.config, self.device)
                yield loss * (len(piece.images) / len(self.masked.images))

    def mask(self, batch: Batch, step: int) -> Masked:
        """The masks of a step's batch; a masking that learns takes its own update first."""
        self.inputs = inputs_of(batch, self.config, self.shards, self.device if self.masking else CPU)
        if self.masking is not None and not self.begun:
            self.masking.begin(self.inputs, self.rate(step))
        return self.objective.masked(self.inputs, step / self.total)

    def accept(self, step: int) -> None:
        if self.masking is not None:
            self.masking.accept(self.model, step / self.total)

    def figures(self, step: int) -> dict[str, float]:
        shares = self.inputs.shares_of_parts(self.masked.ids_masked)
        purity, touched = distributed.mean_over_ranks(shares.to(self.device)).tolist()
        own = self.masking.figures() if self.masking else {}
        if self.config.masking == "semmae":
            epoch = int(self.inputs.batch.epochs[0])
            own["alpha"] = alpha_at(step / self.total, self.config, epoch)
        if self.health.due(step):
            own |= self.health.figures(self.model.encoder, step)
        return {"purity": purity, "touched": touched, **own}

    def measures(self, step: int) -> bool:
        return self.health.due(step)

    def samples(self) -> dict[str, Any]:
        indices, epochs = self.batch.indices.tolist(), self.batch.epochs.tolist()
        keys = [f"{self.shards.row(index).key:08d}" for index in indices]
        return {"seed": self.config.seed, "indices": indices, "epochs": epochs, "keys": keys}

    def stays(self, step: int) -> bool:
        images = self.config.run.keep_every * len(self.shards)
        return images > 0 and ends_period(step - 1, images=images, batch_size=self.batch_size)

    def show(self, step: int) -> None:
        """Eight images, what the run masks of them now, and what becomes of that."""
        if self.total and distributed.is_main():
            epoch = max(0, step - 1) * self.batch_size // len(self.shards)
            device = self.device if self.masking else CPU
            inputs = inputs_of(self.stream.stored(ROWS, epoch=epoch), self.config, self.shards, device)
            path = Path(self.config.run.out) / "pictures" / f"step-{step:08d}.png"
            draw_pictures(path, self.model, self.objective.masked(inputs, step / self.total))

    def tensors(self) -> dict[str, Tensor]:
        return self.objective.tensors()

    def metadata(self) -> dict[str, Any]:
        config = self.config
        vit = {
            "img_size": self.shards.size,
            "patch_size": config.patch,
            "embed_dim": config.embed_dim,
            "depth": config.depth,
            "num_heads": config.heads,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "source": "pretrain",
        }
        mae = {
            "decoder_dim": config.decoder_dim,
            "decoder_depth": config.decoder_depth,
            "decoder_heads": config.decoder_heads,
            "norm_pix_loss": config.norm_pix_loss,
        }
        masks = {field.name: getattr(config, field.name) for field in fields(MaskingConfig)}
        return {"vit": vit, "mae": mae | masks, "data_fingerprint": self.shards.identity}

    def state(self, step: int) -> dict[str, Any]:
        own = {"masking": self.masking.own_state()} if self.masking else {}
        return {"stream": self.stream.state(step * self.batch_size), **own}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.objective.load_tensors(tensors)
        if self.masking is not None:
            self.masking.load_own_state(state["masking"])
        self.stream.resume(state["stream"])

    def open(self, step: int) -> None:
        self.batches = iter(self.stream)

    def close(self) -> None:
        self.batches.close()

    def tell_of_more_epochs(self, before: int) -> None:
        """One line on stderr: what it means that a run of `before` epochs goes on for longer."""
        step = self._steps_of(before)
        print(
            f"--epochs is raised from {before} to {self.config.epochs}: after {step:,} of now {self.total:,} steps the "
            f"learning rate goes on at {self.rate(step):.3g}, where the shorter schedule had come down to "
            f"{self._rate(step, step):.3g}, and progress, which masks that change with training follow, goes back from "
            f"1 to {step / self.total:.3g}",
            file=sys.stderr,
        )

    def report(self, step: int) -> dict[str, Any]:
        return {"samples": step * self.batch_size, "data_fingerprint": self.shards.identity}


def masked_loss(model: nn.Module, masked: Masked, config: PretrainConfig, device: torch.device) -> Float[Tensor, ""]:
    """The loss of these images, in the run's precision.

    Args:
        model: An `Objective`, or what wraps one (DistributedDataParallel, torch.compile).
        masked: On the CPU or on the device.
    """
    masked = masked.to(device)
    images = normalised(unit(masked.images))
    with autocast(device, config.run.precision):
        return model(images, masked.ids_visible, masked.ids_predicted, *masked.extra)


def inputs_of(batch: Batch, config: PretrainConfig, shards: ShardSet, device: torch.device = CPU) -> Inputs:
    """A batch of `shards` as the maskings of this config see it."""
    side = shards.size // config.patch
    return Inputs(batch, config, config.seed, (side, side), shards.groups, shards.background, device)


def _what_fits(config: PretrainConfig, size: int, device: torch.device) -> int | None:
    """Images at once that a GPU has memory for; elsewhere None, the whole batch."""
    if device.type != "cuda":
        return None
    bf16 = config.run.precision != "fp32" and computes_bf16(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    return images_at_once(config, size, memory=memory, bf16=bf16)


def new_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices; none on biases, norms and tokens. The loop sets its rate."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    plain = {name for name, weight in trained if weight.ndim == 1 or name.endswith(("cls_token", "mask_token"))}
    groups = [
        {"params": [weight for name, weight in trained if name not in plain], "weight_decay": config.weight_decay},
        {"params": [weight for name, weight in trained if name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
