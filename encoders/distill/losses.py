"""Self-distillation's projection head, its two losses, and the centring that keeps it from collapsing.

All in fp32, but for the head's MLP; means over the batch are over the batch of all ranks.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from training import distributed
from training.batch_norm import BatchNorm

STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURE = 0.4
"""In units of the spread of the teacher's logits; see `targets`."""
CENTRE_MOMENTUM = 0.9


class Head(nn.Module):
    """MLP, unit length, then the cosine to each prototype; one head for class and patch tokens, as in iBOT.

    With batch normalisation, over one call's tokens on all ranks and without running means. DINO leaves it out for
    ViTs; but class tokens start out almost equal, and with it the first targets already tell them apart (1.2 nats, not
    0.4).
    """

    def __init__(self, dim: int, prototypes: int):
        super().__init__()
        hidden, bottleneck = min(2048, 4 * dim), min(256, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden, bias=False),
            BatchNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden, bias=False),
            BatchNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for weight in [layer.weight for layer in self.mlp if isinstance(layer, nn.Linear)] + [self.prototypes]:
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, tokens: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens prototypes"]:
        directions = self.mlp(tokens).float()
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(F.normalize(directions, dim=-1), F.normalize(self.prototypes, dim=-1))


def targets(
    logits: Float[Tensor, "*axes prototypes"],
    centre: Float[Tensor, " prototypes"],
    temperature: float = TEACHER_TEMPERATURE,
) -> Float[Tensor, "*axes prototypes"]:
    """The teacher's distribution, centred and sharpened: softmax((g - c) / (τ σ)), σ the rms of g - c in the batch.

    DINO (arXiv:2104.14294), eq. 1 and 4, has σ = 1 and τ from 0.04 to 0.07. At first g - c is far smaller than that
    for any two images alike, and a short run ends as it began, at uniform targets; relative to σ they are sharp.
    """
    centred = logits.float() - centre
    rms = distributed.mean_over_ranks(centred.square().mean()).sqrt()
    return (centred / (temperature * rms).clamp(min=1e-6)).softmax(dim=-1)


def class_loss(
    student: Float[Tensor, "crops batch prototypes"], teacher: Float[Tensor, "globals batch prototypes"]
) -> Float[Tensor, ""]:
    """Cross-entropy of every student crop with every teacher crop but itself: DINO (arXiv:2104.14294), eq. 3.

        mean over batch and pairs (t, s), s ≠ t, of  - Σ_k teacher[t, k] · log softmax(student[s] / 0.1)[k]

    `student` holds logits, its global crops first and in the teacher's order; `teacher` holds `targets`.
    """
    crops, global_crops = len(student), len(teacher)
    log_student = (student.float() / STUDENT_TEMPERATURE).log_softmax(dim=-1)
    pairs = -torch.einsum("tbk,sbk->ts", teacher, log_student) / student.shape[1]
    others = torch.ones(global_crops, crops, device=student.device) - torch.eye(
        global_crops, crops, device=student.device
    )
    return (pairs * others).sum() / others.sum()


def patch_loss(
    student: Float[Tensor, "masked prototypes"], teacher: Float[Tensor, "masked prototypes"]
) -> Float[Tensor, ""]:
    """Cross-entropy at the patches masked for the student, where the teacher sees: iBOT (arXiv:2111.07832), eq. 2.

    The mean over patches is the paper's mean over images, because every image has equally many masked.
    """
    return -(teacher * (student.float() / STUDENT_TEMPERATURE).log_softmax(dim=-1)).sum(dim=-1).mean()


def moved_centre(
    centre: Float[Tensor, " prototypes"], logits: Float[Tensor, "*axes prototypes"]
) -> Float[Tensor, " prototypes"]:
    """c ← m c + (1 - m) · mean of the teacher's logits, m = 0.9: DINO (arXiv:2104.14294), eq. 4."""
    return centre.lerp(distributed.mean_over_ranks(logits.float().flatten(0, -2).mean(dim=0)), 1 - CENTRE_MOMENTUM)


def spread(teacher: Float[Tensor, "*axes prototypes"]) -> dict[str, Float[Tensor, ""]]:
    """How the teacher uses its prototypes, in nats; collapse shows as `told_apart` near 0.

    entropy: of one image's distribution (log K = says nothing). kl_uniform: of the batch's mean distribution
    from uniform (log K = one prototype for all). told_apart: what is left, the information on which image it is.
    """
    flat = teacher.flatten(0, -2)
    entropy = distributed.mean_over_ranks(torch.special.entr(flat).sum(dim=-1).mean())
    mean_entropy = torch.special.entr(distributed.mean_over_ranks(flat.mean(dim=0))).sum()
    return {
        "entropy": entropy,
        "kl_uniform": math.log(flat.shape[-1]) - mean_entropy,
        "told_apart": mean_entropy - entropy,
    }
