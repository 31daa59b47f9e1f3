"""A student ViT, its slowly following teacher, and what the one has to predict of the other."""

import copy

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from encoders.distill.config import EncoderConfig
from encoders.distill.crops import GLOBAL_CROPS, sample_crops
from encoders.distill.losses import Head, class_loss, moved_centre, patch_loss, spread, targets
from encoders.distill.objective import Losses, Objective
from encoders.distill.student import new_student
from encoders.tokens import vit_tokens
from training import distributed
from training.device import autocast
from training.schedule import cosine


class StudentTeacher(Objective):
    """DINO (arXiv:2104.14294) on class tokens and iBOT (arXiv:2111.07832) on masked patches, one head for both."""

    saved = "teacher"

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config, self.image_size = config, config.size
        self.student = new_student(config)
        self.student_head = Head(config.embed_dim, config.prototypes)
        self.mask_token = nn.Parameter(torch.zeros(config.embed_dim))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.class_centre: Tensor
        self.patch_centre: Tensor
        self.register_buffer("class_centre", torch.zeros(config.prototypes))
        self.register_buffer("patch_centre", torch.zeros(config.prototypes))
        self.moved: list[tuple[Tensor, Tensor]] = []
        """Each centre and where the last step's logits would take it."""

    def losses(self, images: UInt8[Tensor, "batch height width 3"], *, step: int) -> Losses:
        """Class loss and patch loss of one step's crops."""
        crops = sample_crops(
            images, self.config, step=step, rank=distributed.rank(), world_size=distributed.world_size()
        )
        with autocast(images.device, self.config.run.precision):
            with torch.no_grad():
                seen = vit_tokens(self.teacher, crops.global_crops)
                class_logits = self.teacher_head(seen[:, 0])
                patch_logits = self.teacher_head(seen[:, 1:][crops.masked])
            tokens = vit_tokens(self.student, crops.global_crops, crops.masks, self.mask_token)
            classes, masked = [tokens[:, 0]], tokens[:, 1:][crops.masked]
            if len(crops.local_crops):
                classes.append(vit_tokens(self.student, crops.local_crops)[:, 0])
            class_guesses = self.student_head(torch.cat(classes)).unflatten(0, (-1, len(images)))
            patch_guesses = self.student_head(masked) if len(masked) else None
        class_targets = targets(class_logits, self.class_centre)
        self.moved = [(self.class_centre, moved_centre(self.class_centre, class_logits))]
        of_class = class_loss(class_guesses, class_targets.unflatten(0, (GLOBAL_CROPS, len(images))))
        if patch_guesses is None:
            return Losses(of_class, of_class.new_zeros(()), spread(class_targets))
        of_patch = patch_loss(patch_guesses, targets(patch_logits, self.patch_centre))
        self.moved.append((self.patch_centre, moved_centre(self.patch_centre, patch_logits)))
        return Losses(of_class, of_patch, spread(class_targets))

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """teacher ← m teacher + (1 - m) student, for backbone and head; m rises to 1 along a cosine. The centres move
        to where this step's logits took them."""
        for centre, moved in self.moved:
            centre.copy_(moved)
        momentum = cosine(self.config.teacher_momentum, 1.0, progress)
        for teacher, student in ((self.teacher, self.student), (self.teacher_head, self.student_head)):
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 1 - momentum)
