"""The verb `learn-parts`: images and a frozen encoder become a part learner."""

import math
import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from encoders.frozen import Encoder
from encoders.load import load_encoder
from encoders.weights import fingerprint
from partlearn.attention import part_maps
from partlearn.config import LearnConfig
from partlearn.consistency import Again, consistency_loss
from partlearn.crops import TokenCrop, TokenCrops, image_target
from partlearn.health import health, warnings_of
from partlearn.initialise import start
from partlearn.learner import LearnerShape, PartLearner, shape_as_json
from partlearn.losses import balance_loss, diversity_loss, feature_loss, pixel_loss
from shards.atomic import sha256_json
from shards.images import list_images
from training import checkpoint, distributed
from training.device import autocast, pick_device
from training.metrics import Metrics, last_figures
from training.progress import Progress
from training.run_folder import RunFolder
from training.schedule import learning_rate

LOG_EVERY = 10


def learn(
    config: LearnConfig, *, encoder: Encoder | None = None, stop_after_steps: int | None = None
) -> dict[str, Any]:
    """Fit or train a part learner (SemMAE section 3.1) and leave it in `config.run.out`.

    A finished run is returned as it is; a half one goes on from its newest checkpoint with the same batches. Under
    torchrun each rank takes its block of every batch, and the main one writes; the weights are those of one process on
    the whole batch, but for the balance term, which is each rank's own.

    Args:
        encoder: Takes the place of the one that `config.encoder` names.
        stop_after_steps: End early, as a kill would, after writing a checkpoint.

    Raises:
        ValueError: A setting or the images do not fit the encoder, the memory or the ranks.
        CheckpointError: The encoder's weights cannot be loaded.
    """
    joined = distributed.join(config.run.device)
    try:
        _refuse_ranks(config, distributed.world_size())
        with RunFolder.open(config) as run:
            distributed.barrier()
            return run.report() if run.finished else _train(config, run, encoder, stop_after_steps)
    finally:
        if joined:
            distributed.leave()


def _refuse_ranks(config: LearnConfig, ranks: int) -> None:
    """Before anything is read or written."""
    if config.batch_size % ranks:
        raise ValueError(f"--batch-size {config.batch_size} cannot be shared by {ranks} ranks; choose a multiple")
    if config.kept_crops and ranks > 1:
        raise ValueError(
            f"{ranks} ranks cannot share views kept in memory (--crops {config.crops}); take --crops 0, fresh crops "
            "every step"
        )


def _train(
    config: LearnConfig, run: RunFolder, encoder: Encoder | None, stop_after_steps: int | None
) -> dict[str, Any]:
    device = pick_device(config.run.device)
    images = list_images(config.images)
    encoder = encoder or load_encoder(
        config.encoder,
        grid=config.grid,
        block=config.encoder_block,
        device=device,
        precision=config.run.precision,
    )
    learner = new_learner(config, encoder).to(device)
    optimizer = new_optimizer(learner, config)
    step, resumed = 0, checkpoint.newest(run.path)
    if resumed:
        learner.load_state_dict(checkpoint.load_tensors(resumed / "model.safetensors")[0])
        learner.attention.prototypes.requires_grad_(config.init == "kmeans")
        state = checkpoint.load_state(resumed)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    views = TokenCrops(config, encoder, images)
    if not resumed:
        start(learner, config, encoder, views)
        distributed.broadcast(learner.state_dict().values())
    batches = views.batches(step=step, rank=distributed.rank(), world_size=distributed.world_size())
    metrics, progress = Metrics(run.path, step=step), Progress(config.updates, "parts", "steps", done=step)
    clock = checkpoint.Clock(config.run.checkpoint_minutes)
    figures = last_figures(run.path, step=step)
    if not config.updates:
        figures = over_ranks(_start_health(learner, next(batches)), device)
        metrics.log(0, **figures)
        _save(run, 0, learner, encoder, optimizer)
    end = min(config.updates, stop_after_steps or config.updates)
    while step < end:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step,
                peak=config.base_lr * config.batch_size / 256,
                warmup_steps=min(500, config.updates // 10),
                total_steps=config.updates,
            )
        loss, parts_of_loss, maps, cells = train_step(learner, optimizer, config, encoder, next(batches))
        if step % LOG_EVERY == 0 or step == config.updates - 1:
            figures = {"loss": loss.item(), **parts_of_loss, **health(maps.detach(), cells)}
            figures = over_ranks(figures, device)
            metrics.log(step, **figures)
        step += 1
        progress.advance(**{name: figures[name] for name in ("psnr", "parts_used") if name in figures})
        if clock.due() or step == end:
            _save(run, step, learner, encoder, optimizer)
    progress.close()
    metrics.close()
    for warning in warnings_of(figures, config.num_parts, trained=step > 0) if distributed.is_main() else ():
        print(warning, file=sys.stderr)
    report = {
        "steps": step,
        "images": len(images.images),
        "encoder": encoder.description,
        **figures,
    }
    if step == config.updates:
        run.finish(report)
    distributed.barrier()
    return report


def train_step(
    learner: PartLearner, optimizer: torch.optim.Optimizer, config: LearnConfig, encoder: Encoder, view: TokenCrop
) -> tuple[Float[Tensor, ""], dict[str, float], Tensor, Tensor]:
    """One update from this rank's block of the batch; returns what `_loss` does.

    Raises:
        FloatingPointError: The loss is not finite; the weights are as they were.
    """
    outcome = _loss(learner, config, encoder, view)
    if not torch.isfinite(outcome[0]):
        raise FloatingPointError(f"the loss became {outcome[0].item()}; lower --base-lr or use --precision fp32")
    optimizer.zero_grad()
    outcome[0].backward()
    distributed.average_gradients(learner.parameters())
    torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    optimizer.step()
    return outcome


def _loss(
    learner: PartLearner, config: LearnConfig, encoder: Encoder, view: TokenCrop
) -> tuple[Float[Tensor, ""], dict[str, float], Tensor, Tensor]:
    """Eq. 7: rebuilding + 0.03 · diversity (+ balance), its terms for the log, the maps and the cells they are on.

    psnr is 10 log10(range² / error) on pixels of range 1, or else 10 log10(1 / error) on tokens of unit length.
    """
    cells = learner.learned_cells(view.tokens)
    logits, tokens = learner.read(view.tokens, cells)
    maps = part_maps(logits, config.softmax, cells)
    rebuilding, terms = torch.zeros((), device=maps.device), {}
    if config.target != "pixels":
        missed = feature_loss(maps, learner.vectors, tokens, cells)
        rebuilding = rebuilding + missed
        terms["psnr"] = -10 * math.log10(max(missed.item(), 1e-9))
    if config.target != "features":
        square = maps.unflatten(2, (config.grid, config.grid))
        image = image_target(view, config.decoder_size, encoder)
        known = view.tokens.class_token
        with autocast(image.device, config.run.precision):
            rebuilt = learner.decoder(square, known if config.style == "class" else torch.zeros_like(known))
        rebuilding = rebuilding + pixel_loss(rebuilt, image)
        deviation = torch.tensor(encoder.description["std"], device=image.device).reshape(3, 1, 1)
        terms["psnr"] = -10 * math.log10(max(F.mse_loss(rebuilt * deviation, image * deviation).item(), 1e-9))
    diversity = diversity_loss(maps)
    loss = rebuilding + config.diversity * diversity
    terms |= {"rebuilding": rebuilding.item(), "diversity": diversity.item()}
    if config.softmax == "parts" and config.balance:
        balance = balance_loss(maps, cells)
        loss = loss + config.balance * balance
        terms["balance"] = balance.item()
    if view.again:
        unlike = _unlike(learner, config, view.again, maps, cells)
        loss = loss + config.consistency * unlike
        terms["unlike"] = unlike.item()
    return loss, terms, maps, cells


def _unlike(learner: PartLearner, config: LearnConfig, again: Again, maps: Tensor, cells: Tensor) -> Float[Tensor, ""]:
    """How far the second view's shares are from those of the first."""
    again_cells = learner.learned_cells(again.tokens)
    again_maps = part_maps(learner.read(again.tokens, again_cells)[0], config.softmax, again_cells)
    return consistency_loss(maps, cells, again_maps, again_cells, again.boxes, again.flip)


def over_ranks(ours: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each figure over the ranks."""
    mean = distributed.mean_over_ranks(torch.tensor(list(ours.values()), device=device))
    return dict(zip(ours, mean.tolist(), strict=True))


@torch.no_grad()
def _start_health(learner: PartLearner, view: TokenCrop) -> dict[str, float]:
    cells = learner.learned_cells(view.tokens)
    return health(part_maps(learner.read(view.tokens, cells)[0], learner.shape.softmax, cells), cells)


def new_learner(config: LearnConfig, encoder: Encoder) -> PartLearner:
    """A learner for the encoder's tokens, its weights drawn from the seed; see `start`."""
    shape = LearnerShape(
        dim=encoder.dim,
        width=min(config.directions or encoder.dim, encoder.dim),
        heads=encoder.heads,
        grid=config.grid,
        parts=config.num_parts,
        background=config.background,
        foreground=config.foreground,
        foreground_share=config.foreground_share,
        where=config.where,
        relative=config.relative,
        from_class=config.updates > 0 or config.init != "kmeans",
        whitened=config.directions > 0,
        unit=config.init == "kmeans",
        diffusion=config.diffusion,
        softmax=config.softmax,
        target=config.target,
        decoder_size=config.decoder_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return PartLearner(shape)


def new_optimizer(learner: PartLearner, config: LearnConfig) -> torch.optim.AdamW:
    """AdamW with a weight decay of 0.01 on matrices, none on biases, scales and prototypes."""
    matrices = [p for n, p in learner.named_parameters() if p.ndim > 1 and not n.endswith(("bias", "prototypes"))]
    others = [p for n, p in learner.named_parameters() if p.ndim <= 1 or n.endswith(("bias", "prototypes"))]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.base_lr * config.batch_size / 256, betas=(0.9, 0.99))


def _save(
    run: RunFolder,
    step: int,
    learner: PartLearner,
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
) -> None:
    if not distributed.is_main():
        return
    tensors = learner.state_dict()
    shape = shape_as_json(learner.shape)
    digest = sha256_json([shape, encoder.fingerprint, fingerprint(tensors)])
    checkpoint.save(
        run.path,
        step,
        tensors,
        metadata={"learner": shape, "encoder": encoder.description, "learner_sha256": digest},
        state={"optimizer": optimizer.state_dict()},
    )
