"""A small ViT that learns the tokens of a larger frozen one: the fast encoder of one's own domain.

python -m pipeline encoder --images DIR --teacher timm:vit_large_patch14_dinov2=FILE --out runs/encoder
"""

import math
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.distill.config import EncoderConfig
from encoders.distill.crops import sample_pair
from encoders.distill.objective import Losses, Objective
from encoders.distill.student import blocks_of, new_student
from encoders.frozen import Encoder
from encoders.tokens import vit_tokens
from encoders.whitening import whitening_from
from training import distributed
from training.augment import normalised
from training.checkpoint import CheckpointError
from training.device import autocast

WHITENED = 6
"""One in so many of the teacher's directions, the leading ones, weigh the same in the loss: 64 of ViT-S's 384."""
GROWTH = 1.05
"""By how much the steps that the whitening was found from grow until it is found again."""


class FromTeacher(Objective):
    """The student's tokens, through a linear layer each for class and patches, point where the teacher's do.

    A student of the teacher's own blocks needs no such layers: its tokens become the teacher's centred ones, which are
    near, and a map drawn at random would take it away from them first (docs/log.md).

    Both see the same crop in the same colours (arXiv:2106.05237), each at its own size and on the same grid.
    """

    saved = "student"

    def __init__(self, config: EncoderConfig, teacher: Encoder):
        super().__init__()
        self.config, self.teacher = config, teacher  # an Encoder is no module: neither trained nor saved
        self.image_size = max(config.size, teacher.size)
        if config.teacher_blocks:
            self.mean, self.std = teacher.description["mean"], teacher.description["std"]
            self.student = blocks_of(teacher, config.teacher_blocks)
            self.class_projection, self.patch_projection = nn.Identity(), nn.Identity()
        else:
            self.student = new_student(config)
            self.class_projection = nn.Linear(config.embed_dim, teacher.dim)
            self.patch_projection = nn.Linear(config.embed_dim, teacher.dim)
        self.class_mean: Tensor
        self.patch_mean: Tensor
        self.register_buffer("class_mean", torch.zeros(teacher.dim))
        self.register_buffer("patch_mean", torch.zeros(teacher.dim))
        self.covariance: Tensor
        self.register_buffer("covariance", torch.zeros(teacher.dim, teacher.dim))
        self.whitening: Tensor
        self.register_buffer("whitening", torch.zeros(teacher.dim, max(1, teacher.dim // WHITENED)))
        self.register_load_state_dict_pre_hook(_whitened)

    def losses(self, images: UInt8[Tensor, "batch height width 3"], *, step: int) -> Losses:
        """Cosine losses of one step's crops against the teacher's tokens; moves the statistics, then uses them.

        Patches are compared twice: centred over all images, and as the part learner reads them, within their image
        and whitened. Parts are in directions of small variance, which the first alone hardly teaches (docs/log.md).
        """
        ours, theirs = sample_pair(
            images,
            (self.config.size, self.teacher.size),
            seed=self.config.seed,
            step=step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        seen = self.teacher((255 * theirs).round().byte().permute(0, 2, 3, 1))
        with autocast(images.device, self.config.run.precision):
            tokens = vit_tokens(self.student, normalised(ours, self.mean, self.std)).float()
        self.class_mean.copy_(running_mean(self.class_mean, seen.class_token.mean(dim=0), step=step))
        self.patch_mean.copy_(running_mean(self.patch_mean, seen.patch_tokens.mean(dim=(0, 1)), step=step))
        relative = within_image(seen.patch_tokens)
        self.covariance.copy_(running_mean(self.covariance, covariance(relative), step=step))
        if whitens(step):
            self.whitening.copy_(whitening_from(self.covariance.cpu(), self.whitening.shape[1]))
        of_image = self.class_projection(tokens[:, 0])
        of_cells = self.patch_projection(tokens[:, 1:])
        return Losses(
            self.config.class_weight * cosine_loss(of_image, seen.class_token - self.class_mean),
            cosine_loss(of_cells, seen.patch_tokens - self.patch_mean)
            + cosine_loss(within_image(of_cells) @ self.whitening, relative @ self.whitening),
            {"told_apart": told_apart(of_image if self.config.class_weight else of_cells.mean(dim=1))},
        )

    def get_extra_state(self) -> str:
        return self.teacher.fingerprint

    def set_extra_state(self, state: str) -> None:
        if state != self.teacher.fingerprint:
            raise CheckpointError(
                f"the weights of {self.config.teacher} are not those this run began with; bring them back, "
                "or start again with another --out"
            )


def _whitened(objective: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Half-done runs of before the whitening was kept go on."""
    width = objective.get_buffer("whitening").shape[1]
    state.setdefault(f"{prefix}whitening", whitening_from(state[f"{prefix}covariance"], width))


def whitens(step: int) -> bool:
    """Whether a step, from 0, finds the whitening of all tokens so far: the first twenty do, then one whenever a
    twentieth more steps were taken.

    The decomposition is in fp64 on the CPU, and everything waits for it. What it is of is a mean over all steps, which
    moves less and less: 147 decompositions do for 10,000 steps.
    """
    return step < 20 or math.floor(math.log(step + 1, GROWTH)) > math.floor(math.log(step, GROWTH))


def cosine_loss(predicted: Float[Tensor, "*axes dim"], target: Float[Tensor, "*axes dim"]) -> Float[Tensor, ""]:
    """Mean over tokens of 1 - cos(predicted, target): 0 where they point the same way, 1 at right angles."""
    return (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()


def within_image(tokens: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches dim"]:
    """Tokens minus their image's mean."""
    return tokens - tokens.mean(dim=1, keepdim=True)


def covariance(centred: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "dim dim"]:
    """Of centred tokens, over all patches."""
    points = centred.flatten(0, 1)
    return points.T @ points / len(points)


def running_mean(mean: Float[Tensor, "*axes"], now: Float[Tensor, "*axes"], *, step: int) -> Float[Tensor, "*axes"]:
    """μ ← μ + (this step's mean over all ranks - μ) / (step + 1): the mean over all the steps so far.

    The teacher is frozen, so its mean is one number a dimension, and all steps tell equally much of it. It is taken off
    because a transformer's tokens share a large direction: two tokens of unlike things may have a cosine of .8. Against
    such targets a student that always gives the mean loses little, and the differences that matter hardly pull.
    """
    return mean.lerp(distributed.mean_over_ranks(now), 1 / (step + 1))


def told_apart(predicted: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """1 - the mean cosine of the batch's predictions with each other: near 0 when all images get the same one.

    Of predictions and not of class tokens, which share a large direction of their own that says nothing.
    """
    mean = distributed.mean_over_ranks(F.normalize(predicted.detach(), dim=-1).mean(dim=0))
    return 1 - mean.square().sum()
