"""The verb `learn-parts`: pictures and a frozen encoder become a part learner."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from partlearn.config import LearnConfig
from partlearn.encoders import Encoder, load_encoder
from partlearn.health import health
from partlearn.kmeans import spherical_kmeans
from partlearn.learner import LearnerShape, PartLearner, shape_as_json
from partlearn.losses import balance_loss, diversity_loss, feature_loss, pixel_loss
from partlearn.parts import centred_tokens, part_maps
from partlearn.view_tokens import View, Views, picture_target
from partlearn.weights import fingerprint
from shards.atomic import sha256_json
from shards.pictures import list_pictures
from training import checkpoint
from training.device import pick_device
from training.metrics import Metrics
from training.progress import Progress
from training.run import RunFolder
from training.schedule import learning_rate

PROTOTYPE_SCALE = 10.0
KMEANS_POINTS = 40_000
LOG_EVERY = 10


def learn(
    config: LearnConfig, *, encoder: Encoder | None = None, stop_after_steps: int | None = None
) -> dict[str, Any]:
    """Train a part learner (SemMAE section 3.1) and leave it in `config.run.out`.

    A finished run is returned as it is; a half one goes on from its newest checkpoint with the same batches.

    Args:
        encoder: Takes the place of the one that `config.encoder` names.
        stop_after_steps: End early, as a kill would, after writing a checkpoint.

    Raises:
        ValueError: A setting or the pictures do not fit the encoder or the memory.
        CheckpointError: The encoder's weights cannot be loaded.
    """
    with RunFolder.open(config) as run:
        if run.finished:
            return run.report()
        device = pick_device(config.run.device)
        pictures = list_pictures(config.images)
        encoder = encoder or load_encoder(
            config.encoder,
            grid=config.grid,
            block=config.encoder_block,
            device=device,
            precision=config.run.precision,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            learner = PartLearner(_shape(config, encoder)).to(device)
        optimiser = torch.optim.AdamW(_decayed(learner), lr=config.lr, betas=(0.9, 0.99))
        step, resumed = 0, checkpoint.newest(run.path)
        if resumed:
            learner.load_state_dict(checkpoint.load_tensors(resumed / "model.safetensors")[0])
            learner.attention.prototypes.requires_grad_(config.init == "kmeans")
            state = checkpoint.load_state(resumed)
            optimiser.load_state_dict(state["optimiser"])
            step = state["step"]
        views = Views(config, encoder, pictures)
        if not resumed:
            _start(learner, config, encoder, views)
        if not config.steps:
            _save(run, 0, learner, encoder, optimiser)
        batches = views.batches(step=step)
        metrics, progress = Metrics(run.path, step=step), Progress(config.steps, "parts", "steps", done=step)
        clock = checkpoint.Clock(config.run.checkpoint_minutes)
        figures: dict[str, float] = {}
        end = min(config.steps, stop_after_steps or config.steps)
        while step < end:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(
                    step, peak=config.lr, warmup_steps=min(500, config.steps // 10), total_steps=config.steps
                )
            loss, parts_of_loss, maps, cells = _loss(learner, config, encoder, next(batches))
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss became {loss.item()} at step {step}; lower --lr or use --precision fp32"
                )
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimiser.step()
            if step % LOG_EVERY == 0 or step == config.steps - 1:
                figures = parts_of_loss | health(maps.detach(), cells)
                metrics.log(step, loss=loss.item(), **figures)
            step += 1
            progress.advance(**{name: figures[name] for name in ("psnr", "parts_used") if name in figures})
            if clock.due() or step == end:
                _save(run, step, learner, encoder, optimiser)
        progress.close()
        metrics.close()
        report = {
            "steps": step,
            "pictures": len(pictures.pictures),
            "encoder": encoder.description,
            **figures,
        }
        if step == config.steps:
            run.finish(report)
        return report


def _loss(
    learner: PartLearner, config: LearnConfig, encoder: Encoder, view: View
) -> tuple[Float[Tensor, ""], dict[str, float], Tensor, Tensor]:
    """Eq. 7: rebuilding + 0.03 · diversity (+ balance), its terms for the log, the maps and the cells they are on.

    psnr is 10 log10(range² / error) on pixels of range 1, and 10 log10(1 / error) on tokens of unit length.
    """
    cells = learner.learned_cells(view.tokens)
    logits, tokens = learner.read(view.tokens, cells)
    maps = part_maps(logits, config.softmax, cells)
    if config.target == "features":
        rebuilding = feature_loss(maps, learner.vectors, tokens, cells)
        psnr = -10 * math.log10(max(rebuilding.item(), 1e-9))
    else:
        square = maps.unflatten(2, (config.grid, config.grid))
        picture = picture_target(view, config.decoder_size, encoder)
        rebuilt = learner.decoder(square, view.tokens.class_token)
        rebuilding = pixel_loss(rebuilt, picture)
        deviation = torch.tensor(encoder.description["std"], device=picture.device).reshape(3, 1, 1)
        psnr = -10 * math.log10(max(F.mse_loss(rebuilt * deviation, picture * deviation).item(), 1e-9))
    diversity = diversity_loss(maps)
    loss = rebuilding + config.diversity * diversity
    terms = {"rebuilding": rebuilding.item(), "psnr": psnr, "diversity": diversity.item()}
    if config.softmax == "parts" and config.balance:
        balance = balance_loss(maps, cells)
        loss = loss + config.balance * balance
        terms["balance"] = balance.item()
    return loss, terms, maps, cells


@torch.no_grad()
def _start(learner: PartLearner, config: LearnConfig, encoder: Encoder, views: Views) -> None:
    """Queries of step 0: the encoder's heads, random ones, or k-means centres of the first batches' tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    if config.init != "kmeans":
        if config.init == "heads":
            learner.attention.start_at_heads(encoder.blocks[encoder.block].attn, generator)
        else:
            learner.attention.start_at_random(generator)
        if config.target == "features":
            learner.vectors.copy_(0.02 * torch.randn(learner.vectors.shape, generator=generator))
        return
    points = _inside_tokens(learner, views)
    learner.deviation.copy_(points.std(dim=0).clamp(min=1e-6))
    unit = F.normalize(points / learner.deviation, dim=1).cpu()
    centres = spherical_kmeans(unit, config.parts, generator=generator).to(points.device)
    learner.attention.start_at_prototypes(centres, PROTOTYPE_SCALE, generator)
    if config.target == "features":
        learner.vectors.copy_(centres)


def _inside_tokens(learner: PartLearner, views: Views) -> Float[Tensor, "points dim"]:
    """Up to KMEANS_POINTS tokens of learned cells, each minus its picture's mean, deviations not yet divided out."""
    points, count = [], 0
    for view in views.batches(step=0):
        cells = learner.learned_cells(view.tokens)
        points.append(centred_tokens(view.tokens.block_tokens[:, 1:], cells)[cells])
        count += len(points[-1])
        if count >= KMEANS_POINTS:
            break
    return torch.cat(points)[:KMEANS_POINTS]


def _shape(config: LearnConfig, encoder: Encoder) -> LearnerShape:
    return LearnerShape(
        dim=encoder.dim,
        heads=encoder.heads,
        grid=config.grid,
        parts=config.parts,
        background=config.background,
        foreground=config.foreground,
        foreground_share=config.foreground_share,
        where=config.where,
        relative=config.relative,
        softmax=config.softmax,
        target=config.target,
        decoder_size=config.decoder_size,
    )


def _decayed(learner: PartLearner) -> list[dict[str, Any]]:
    """Weight decay 0.01 on matrices, none on biases, scales and prototypes."""
    matrices = [p for n, p in learner.named_parameters() if p.ndim > 1 and not n.endswith(("bias", "prototypes"))]
    others = [p for n, p in learner.named_parameters() if p.ndim <= 1 or n.endswith(("bias", "prototypes"))]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]


def _save(
    run: RunFolder,
    step: int,
    learner: PartLearner,
    encoder: Encoder,
    optimiser: torch.optim.Optimizer,
) -> None:
    tensors = learner.state_dict()
    shape = shape_as_json(learner.shape)
    digest = sha256_json([shape, encoder.fingerprint, fingerprint(tensors)])
    checkpoint.save(
        run.path,
        step,
        tensors,
        metadata={"learner": shape, "encoder": encoder.description, "learner_sha256": digest},
        state={"optimiser": optimiser.state_dict()},
    )
