"""A student ViT, its slowly following teacher, and what the one has to predict of the other."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from partlearn.distill_loss import Head, class_loss, moved_centre, patch_loss, spread, targets


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one step; `shown` are the teacher's figures."""

    of_class: Float[Tensor, ""]
    of_patch: Float[Tensor, ""]
    shown: dict[str, float]


class StudentTeacher(nn.Module):
    """DINO (arXiv:2104.14294) on class tokens and iBOT (arXiv:2111.07832) on hidden patches, one head for both."""

    def __init__(self, *, size: int, patch: int, dim: int, depth: int, heads: int, prototypes: int):
        super().__init__()
        self.student = VisionTransformer(
            img_size=size,
            patch_size=patch,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            dynamic_img_size=True,
        )
        self.student_head = Head(dim, prototypes)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.class_centre: Tensor
        self.patch_centre: Tensor
        self.register_buffer("class_centre", torch.zeros(prototypes))
        self.register_buffer("patch_centre", torch.zeros(prototypes))

    def losses(
        self,
        global_crops: Float[Tensor, "global_crops 3 size size"],
        local_crops: Float[Tensor, "local_crops 3 local_size local_size"],
        masks: Bool[Tensor, "global_crops patches"],
        *,
        batch: int,
    ) -> Losses:
        """Both losses of one batch; moves the centres, after they were used."""
        with torch.no_grad():
            seen = vit_tokens(self.teacher, global_crops)
            class_logits = self.teacher_head(seen[:, 0])
            patch_logits = self.teacher_head(seen[:, 1:][masks])
            class_targets = targets(class_logits, self.class_centre)
            patch_targets = targets(patch_logits, self.patch_centre)
            self.class_centre.copy_(moved_centre(self.class_centre, class_logits))
            if len(patch_logits):
                self.patch_centre.copy_(moved_centre(self.patch_centre, patch_logits))
        tokens = vit_tokens(self.student, global_crops, masks, self.mask_token)
        classes = [tokens[:, 0]]
        if len(local_crops):
            classes.append(vit_tokens(self.student, local_crops)[:, 0])
        logits = self.student_head(torch.cat(classes)).unflatten(0, (-1, batch))
        of_class = class_loss(logits, class_targets.unflatten(0, (-1, batch)))
        hidden = tokens[:, 1:][masks]
        of_patch = patch_loss(self.student_head(hidden), patch_targets) if len(hidden) else of_class.new_zeros(())
        return Losses(of_class, of_patch, spread(class_targets))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """teacher ← m teacher + (1 - m) student, for backbone and head."""
        for teacher, student in ((self.teacher, self.student), (self.teacher_head, self.student_head)):
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 1 - momentum)


def vit_tokens(
    model: VisionTransformer,
    images: Float[Tensor, "batch 3 height width"],
    masks: Bool[Tensor, "batch patches"] | None = None,
    mask_token: Float[Tensor, " dim"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Class and patch tokens after the final norm; hidden patches enter as the mask token at their positions."""
    x = model.patch_embed(images)
    if masks is not None and mask_token is not None:
        x = torch.where(masks.reshape(x.shape[:3])[..., None], mask_token.to(x.dtype), x)
    return model.norm(model.blocks(model.norm_pre(model._pos_embed(x))))
