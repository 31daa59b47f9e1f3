"""The verb `learn-parts`: images and a frozen encoder become a part learner."""

import sys
from collections.abc import Iterator
from contextlib import closing
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
from training import distributed
from training.device import autocast, pick_device
from training.loop import train
from training.metrics import Metrics
from training.run_folder import RunFolder, opened
from training.saving import save
from training.schedule import learning_rate
from training.task import Task

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

    def check(ranks: int) -> None:
        if config.kept_crops and ranks > 1:
            raise ValueError(
                f"{ranks} ranks cannot share crops kept in memory (--crops {config.crops}); take --crops 0, fresh "
                "crops every step"
            )

    with opened(config, check=check) as run:
        if run.finished:
            return run.report()
        task = PartLearning(config, encoder)
        report = (
            train(task, run, config.run, total=config.updates, stop_after_steps=stop_after_steps)
            if config.updates
            else _started(task, run)
        )
        for warning in (
            warnings_of(report, config.num_parts, trained=report["steps"] > 0) if distributed.is_main() else ()
        ):
            print(warning, file=sys.stderr)
    return report


class PartLearning(Task):
    """A part learner on the tokens of a frozen encoder."""

    name = "parts"
    largest_norm = 1.0
    log_every = LOG_EVERY
    shown = ("psnr", "parts_used")

    def __init__(self, config: LearnConfig, encoder: Encoder | None = None):
        self.config, self.batch_size = config, config.batch_size
        self.device = pick_device(config.run.device)
        self.images = list_images(config.images)
        self.encoder = encoder or load_encoder(
            config.encoder,
            grid=config.grid,
            block=config.encoder_block,
            mean=config.encoder_mean,
            std=config.encoder_std,
            device=self.device,
            precision=config.run.precision,
        )
        self.learner = new_learner(config, self.encoder).to(self.device)
        self.optimizer = new_optimizer(self.learner, config)
        self.resumed = False

    def rate(self, step: int) -> float:
        updates = self.config.updates
        return learning_rate(step, peak=_peak(self.config), warmup_steps=min(500, updates // 10), total_steps=updates)

    def read(self, step: int) -> None:
        """The frozen encoder's tokens are this task's data."""
        self.batch = next(self.batches)

    def losses(self, step: int) -> Iterator[Float[Tensor, ""]]:
        """One micro-batch: the balance of the parts is over the whole batch."""
        loss, self.terms, self.maps, self.cells = parts_loss(self.learner, self.config, self.encoder, self.batch)
        yield loss
        distributed.average_gradients(self.learner.parameters())

    def figures(self, step: int) -> dict[str, float]:
        terms = {name: term.item() for name, term in self.terms.items()}
        return over_ranks(terms | health(self.maps.detach(), self.cells), self.device)

    def tensors(self) -> dict[str, Tensor]:
        return self.learner.state_dict()

    def metadata(self) -> dict[str, Any]:
        shape = shape_as_json(self.learner.shape)
        digest = sha256_json([shape, self.encoder.fingerprint, fingerprint(self.learner.state_dict())])
        return {"learner": shape, "encoder": self.encoder.description, "learner_sha256": digest}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.learner.load_state_dict(tensors)
        self.learner.attention.prototypes.requires_grad_(self.config.init == "kmeans")
        self.resumed = True

    def open(self, step: int) -> None:
        crops = TokenCrops(self.config, self.encoder, self.images)
        if not self.resumed:
            start(self.learner, self.config, self.encoder, crops)
            distributed.broadcast(self.learner.state_dict().values())
        self.batches = crops.batches(step=step, rank=distributed.rank(), world_size=distributed.world_size())

    def close(self) -> None:
        self.batches.close()

    def report(self, step: int) -> dict[str, Any]:
        return {"images": len(self.images.images), "encoder": self.encoder.description}


def _started(task: PartLearning, run: RunFolder) -> dict[str, Any]:
    """A learner that takes no step: it is what its start made of it."""
    task.open(0)
    with closing(task.batches) as batches, closing(Metrics(run.path, step=0)) as metrics:
        figures = over_ranks(_start_health(task.learner, next(batches)), task.device)
        metrics.log(0, **figures)
    save(task, run, 0)
    report = {"steps": 0, **task.report(0), **figures}
    run.finish(report)
    distributed.barrier()
    return report


def parts_loss(
    learner: PartLearner, config: LearnConfig, encoder: Encoder, view: TokenCrop
) -> tuple[Float[Tensor, ""], dict[str, Tensor], Tensor, Tensor]:
    """Eq. 7: rebuilding + 0.03 · diversity (+ balance), its terms for the log, the maps and the cells they are on.

    psnr is 10 log10(range² / error) on pixels of range 1, or else 10 log10(1 / error) on tokens of unit length. Nothing
    is read back from the device: the terms are scalars there.
    """
    cells = learner.learned_cells(view.tokens)
    logits, tokens = learner.read(view.tokens, cells)
    maps = part_maps(logits, config.softmax, cells)
    rebuilding, terms = torch.zeros((), device=maps.device), dict[str, Tensor]()
    if config.target != "pixels":
        missed = feature_loss(maps, learner.vectors, tokens, cells)
        rebuilding = rebuilding + missed
        terms["psnr"] = _decibels(missed)
    if config.target != "features":
        square = maps.unflatten(2, (config.grid, config.grid))
        image = image_target(view, config.rebuilt_size, encoder)
        known = view.tokens.class_token
        with autocast(image.device, config.run.precision):
            rebuilt = learner.decoder(square, known if config.style == "class" else torch.zeros_like(known))
        rebuilding = rebuilding + pixel_loss(rebuilt, image, config.pixel_error)
        terms["psnr"] = _decibels(F.mse_loss(rebuilt * encoder.std, image * encoder.std))
    diversity = diversity_loss(maps)
    loss = rebuilding + config.diversity * diversity
    terms |= {"rebuilding": rebuilding.detach(), "diversity": diversity.detach()}
    if config.softmax == "parts" and config.balance:
        balance = balance_loss(maps, cells)
        loss = loss + config.balance * balance
        terms["balance"] = balance.detach()
    if view.again:
        unlike = _unlike(learner, config, view.again, maps, cells)
        loss = loss + config.consistency * unlike
        terms["unlike"] = unlike.detach()
    return loss, terms, maps, cells


def _decibels(error: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return -10 * error.detach().float().clamp(min=1e-9).log10()


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
        foreground=config.scorer,
        foreground_share=config.foreground_share,
        where=config.where,
        relative=config.relative,
        from_class=config.updates > 0 or config.init != "kmeans",
        whitened=config.directions > 0,
        unit=config.init == "kmeans",
        diffusion=config.diffusion,
        softmax=config.softmax,
        target=config.target,
        decoder_size=config.rebuilt_size,
        kinds=config.kinds_of_objects,
        gate=config.gate,
        projections=config.projections,
        temperature=config.temperature,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return PartLearner(shape)


def new_optimizer(learner: PartLearner, config: LearnConfig) -> torch.optim.AdamW:
    """AdamW with a weight decay of 0.01 on matrices, none on biases, scales and prototypes."""
    matrices = [p for n, p in learner.named_parameters() if p.ndim > 1 and not n.endswith(("bias", "prototypes"))]
    others = [p for n, p in learner.named_parameters() if p.ndim <= 1 or n.endswith(("bias", "prototypes"))]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=_peak(config), betas=(0.9, 0.99))


def _peak(config: LearnConfig) -> float:
    return config.base_lr * config.batch_size / 256
