"""The verb `pretrain`: one process, torchrun's ranks or Ray Train's workers, from the same function."""

import math
import time
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.config import PretrainConfig
from pretrain.mae import MAE
from pretrain.masking.batch import Masked, mask_batch
from pretrain.masking.budget import masked_count, purity
from pretrain.masking.patches import kept_count
from pretrain.masking.semmae import alpha_at
from shards.shard_set import ShardSet
from shards.stream import Stream
from training import checkpoint, distributed
from training.device import autocast, pick_device, plain_attention_on_cpu
from training.metrics import Metrics
from training.progress import Progress
from training.run_folder import RunFolder
from training.schedule import learning_rate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOG_EVERY = 10


def pretrain(config: PretrainConfig, *, stop_after_steps: int | None = None) -> dict[str, Any]:
    """Train a masked autoencoder into `config.run.out` and return its report.

    A finished run is returned as it is, a half one goes on from its newest checkpoint at the exact sample.
    `stop_after_steps` ends early, as a kill would, after writing a checkpoint.

    Raises:
        ValueError: The shards do not fit the settings, or carry no parts for --masking semmae.
        ShardError: The shard set is unfinished or damaged.
        FloatingPointError: The loss or a weight is no longer finite; the checkpoints before it are left whole.
    """
    joined = distributed.join(config.run.device)
    try:
        with RunFolder.open(config) as run:
            distributed.barrier()
            if run.finished:
                return run.report()
            cache_bytes = int(config.run.cache_gb * 1e9)
            with ShardSet.open(
                config.data, labels=config.labels, cache=config.run.cache, cache_bytes=cache_bytes
            ) as shards:
                return _train(config, run, shards, stop_after_steps)
    finally:
        if joined:
            distributed.leave()


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


def _train(config: PretrainConfig, run: RunFolder, shards: ShardSet, stop_after_steps: int | None) -> dict[str, Any]:
    _refuse_what_does_not_fit(config, shards)
    device = pick_device(config.run.device)
    if device.type == "cuda":
        torch.set_num_threads(1)  # the stream's threads crop with torch; the rest of the work is the device's
    model = build(config, shards.size).to(device)
    plain_attention_on_cpu(model, device)
    optimizer = new_optimizer(model, config)
    total = math.ceil(config.epochs * len(shards) / config.batch_size)
    stream = Stream(
        shards,
        batch_size=config.batch_size,
        seed=config.seed,
        window=config.window,
        flip=config.flip,
        crop_scale=config.crop_scale,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        threads=config.run.threads,
        substitutes=config.substitutes,
    )
    step = _resume(run, model, optimizer, stream)
    wrapped: nn.Module = model
    if distributed.world_size() > 1:
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    batches = iter(stream)
    metrics = Metrics(run.path, step=step)
    progress = Progress(total, f"pretrain {config.masking}", "steps", done=step)
    clock = checkpoint.Clock(config.run.checkpoint_minutes)
    end = total if stop_after_steps is None else min(total, stop_after_steps)
    began, first = time.monotonic(), step
    figures: dict[str, float] = {}
    try:
        while step < end:
            alpha = alpha_at(step / total, config.gamma)
            rate = learning_rate(
                step,
                peak=config.base_lr * config.batch_size / 256,
                warmup_steps=round(config.warmup_epochs * len(shards) / config.batch_size),
                total_steps=total,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            masked = mask_batch(next(batches), config, side=model.side, groups=shards.groups, alpha=alpha)
            loss = train_step(wrapped, optimizer, masked, config, device)
            if step % LOG_EVERY == 0 or step == total - 1:
                figures = {"loss": distributed.mean_over_ranks(loss).item(), "lr": rate, "alpha": alpha}
                if not math.isfinite(figures["loss"]):
                    raise FloatingPointError(
                        f"the loss is {figures['loss']} at step {step}; start again with a lower --base-lr, "
                        "or with --precision fp32"
                    )
                figures["purity"] = purity(masked.mask, masked.labels, shards.groups).item()
                speed = (step - first + 1) * config.batch_size / (time.monotonic() - began)
                gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients).item()
                metrics.log(step, **figures, grad_norm=norm, images_per_second=speed)
            step += 1
            progress.advance(**figures)
            if clock.due() and step < end:
                _save(run, step, model, optimizer, config, stream)
        _save(run, step, model, optimizer, config, stream)
    finally:
        batches.close()
        progress.close()
        metrics.close()
    report = {
        "steps": step,
        "samples": step * config.batch_size,
        "data_fingerprint": shards.identity,
        **figures,
    }
    if step == total:
        run.finish(report)
    distributed.barrier()
    return report


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    masked: Masked,
    config: PretrainConfig,
    device: torch.device,
) -> torch.Tensor:
    """One update; returns the loss of this rank's images. The gradients stay until the next step.

    Args:
        model: An `MAE`, or what wraps one (DistributedDataParallel, torch.compile).
        masked: On the CPU or on the device.
    """
    mean, std = _mean_and_std(device)
    images = (masked.images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with autocast(device, config.run.precision):
        loss = model(images, masked.ids_visible.to(device), masked.ids_masked.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@cache
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """On the device, once: to bring them there in every step would let the host wait for it."""
    mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (MEAN, STD))
    return mean, std


def _refuse_what_does_not_fit(config: PretrainConfig, shards: ShardSet) -> None:
    if config.masking == "semmae" and shards.groups < 2:
        raise ValueError(
            f"--masking semmae needs part labels, and {config.data} has {shards.groups} group of them; "
            "extract with a part learner, or take --masking random"
        )
    if shards.size % config.patch:
        raise ValueError(f"--patch {config.patch} does not divide the {shards.size}-px images of {config.data}")
    side = shards.size // config.patch
    if shards.grid % side:
        raise ValueError(
            f"{side}x{side} patches do not divide the {shards.grid}x{shards.grid} label grid of {config.data}; "
            "choose another --patch, or extract with another --grid"
        )
    kept = kept_count(side, config.keep_share)
    masked = masked_count(kept, config.mask_ratio)
    if not 0 < masked < kept:
        raise ValueError(
            f"--mask-ratio {config.mask_ratio} masks {masked} of the {kept} patches kept of an image, expected at "
            "least one masked and one visible; change it, or choose a smaller --patch or a larger --keep-share"
        )
    if config.batch_size % distributed.world_size():
        raise ValueError(f"--batch-size {config.batch_size} cannot be shared by {distributed.world_size()} ranks")


def new_optimizer(model: MAE, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices; none on biases, norms and tokens. The loop sets its rate."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    plain = {name for name, weight in trained if weight.ndim == 1 or name.endswith(("cls_token", "mask_token"))}
    groups = [
        {"params": [weight for name, weight in trained if name not in plain], "weight_decay": config.weight_decay},
        {"params": [weight for name, weight in trained if name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def _save(
    run: RunFolder,
    step: int,
    model: MAE,
    optimizer: torch.optim.Optimizer,
    config: PretrainConfig,
    stream: Stream,
) -> None:
    """Write a checkpoint, on the main rank; refused on every rank when a weight is not finite.

    A loss can still be finite on the step that spoils the weights, and the newest checkpoint is where a run resumes.
    """
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise FloatingPointError(
            f"weights are no longer finite after step {step - 1}; resume from the last checkpoint with "
            "--precision fp32, or start again with a lower --base-lr"
        )
    if not distributed.is_main():
        return
    vit = {
        "img_size": stream.shards.size,
        "patch_size": config.patch,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "mean": list(MEAN),
        "std": list(STD),
        "source": "pretrain",
    }
    mae = {
        "decoder_dim": config.decoder_dim,
        "decoder_depth": config.decoder_depth,
        "decoder_heads": config.decoder_heads,
        "norm_pix_loss": config.norm_pix_loss,
        "masking": config.masking,
        "mask_ratio": config.mask_ratio,
        "keep_share": config.keep_share,
        "gamma": config.gamma,
    }
    checkpoint.save(
        run.path,
        step,
        model.state_dict(),
        metadata={"vit": vit, "mae": mae, "data_fingerprint": stream.shards.identity},
        state={"optimizer": optimizer.state_dict(), "stream": stream.state(step * config.batch_size)},
    )


def _resume(run: RunFolder, model: MAE, optimizer: torch.optim.Optimizer, stream: Stream) -> int:
    """Continue from the newest checkpoint, the stream where it was; returns the steps done."""
    newest = checkpoint.newest(run.path)
    if newest is None:
        return 0
    model.load_state_dict(checkpoint.load_tensors(newest / "model.safetensors")[0])
    state = checkpoint.load_state(newest)
    optimizer.load_state_dict(state["optimizer"])
    stream.resume(state["stream"])
    return state["step"]
