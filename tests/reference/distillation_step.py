"""A step of self-distillation: an image, a pair of crops and a weight at a time, in float64.

DINO: arXiv:2104.14294, algorithm 1 and eq. 1 to 4. iBOT: arXiv:2111.07832, eq. 2. What departs stands in
encoders/distill/losses.py: batch normalisation in the head, and a teacher's temperature in units of its spread.
"""

import math

import numpy as np
import torch
from reference.vit import block, linear, norm, patches_of
from torch import Tensor
from torch.nn import functional as F

from training.augment import crop, jitter_colour, random_boxes
from training.block_masks import block_masks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def generator_of(seed: int, step: int) -> torch.Generator:
    """The draws of one step."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


def crops_of(images: Tensor, config, *, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two global crops of .35 to all of an image, the local ones of .08 to .35, and which patches are masked."""
    draws, pixels = generator_of(config.seed, step), images.permute(0, 3, 1, 2) / 255
    shown = {config.size: [], config.local_size: []}
    for size, count, scale in ((config.size, 2, (0.35, 1.0)), (config.local_size, config.local_crops, (0.08, 0.35))):
        for _ in range(count):
            boxes = random_boxes(len(pixels), scale=scale, generator=draws)
            flip = torch.rand(len(pixels), generator=draws) < 0.5
            lit = jitter_colour(crop(pixels, boxes, size, flip), strength=0.4, generator=draws)
            shown[size].append((lit - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    masks = block_masks(2 * len(pixels), config.size // config.patch, share=config.mask_ratio, generator=draws)
    return torch.cat(shown[config.size]), torch.cat(shown[config.local_size]), masks


def pair_of(images: Tensor, sizes: tuple[int, int], *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """One crop of each image in other colours, at two sizes, in [0, 1]."""
    draws, pixels = generator_of(seed, step), images.permute(0, 3, 1, 2) / 255
    boxes = random_boxes(len(pixels), scale=(0.35, 1.0), generator=draws)
    flip = torch.rand(len(pixels), generator=draws) < 0.5
    lit = jitter_colour(pixels, strength=0.4, generator=draws)
    return crop(lit, boxes, sizes[0], flip), crop(lit, boxes, sizes[1], flip)


class FromTeacher:
    """What a frozen teacher says of images, and how far a student's tokens point elsewhere."""

    def __init__(self, teacher: dict[str, Tensor], heads: int):
        self.teacher = {f"teacher.{name}": one.double() for name, one in teacher.items()}
        self.heads, self.classes, self.patches, self.relative = heads, [], [], []

    def losses(
        self, student: dict[str, Tensor], heads: int, seen: Tensor, ours: Tensor, class_weight: float
    ) -> tuple[Tensor, Tensor]:
        """1 - cosine with the teacher's tokens less their mean over all steps; patches also within their image, along
        the sixth of the directions in which they vary most, each of deviation 1."""
        theirs = torch.stack([tokens_of(self.teacher, "teacher", self.heads, one) for one in seen])
        within = theirs[:, 1:] - theirs[:, 1:].mean(dim=1, keepdim=True)
        self.classes.append(theirs[:, 0].mean(dim=0))
        self.patches.append(theirs[:, 1:].mean(dim=(0, 1)))
        self.relative.append(within.flatten(0, 1))
        points = torch.cat(self.relative)
        variances, directions = np.linalg.eigh((points.T @ points / len(points)).numpy())
        most = len(variances) // 6
        whitening = torch.from_numpy(directions[:, -most:] / np.sqrt(variances[-most:]))
        tokens = torch.stack([tokens_of(student, "student", heads, one) for one in ours])
        of_class = linear(student, "class_projection", tokens[:, 0])
        of_cells = linear(student, "patch_projection", tokens[:, 1:])
        cells = of_cells - of_cells.mean(dim=1, keepdim=True)
        of_image = _apart(of_class, theirs[:, 0] - torch.stack(self.classes).mean(dim=0))
        of_patches = _apart(of_cells, theirs[:, 1:] - torch.stack(self.patches).mean(dim=0))
        return class_weight * of_image, of_patches + _apart(cells @ whitening, within @ whitening)


class SelfDistillation:
    """A student, its teacher and both centres; weights by name, float64."""

    def __init__(self, state: dict[str, Tensor], config):
        names = ("student.", "student_head.", "mask_token")
        self.student = {name: one.double() for name, one in state.items() if name.startswith(names)}
        self.teacher = {name: one.double() for name, one in state.items() if name.startswith("teacher")}
        self.class_centre, self.patch_centre = state["class_centre"].double(), state["patch_centre"].double()
        self.config = config

    def losses(self, student: dict[str, Tensor], big: Tensor, small: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Class loss and patch loss; keeps the teacher's logits for `follow`."""
        images, heads = len(big) // 2, self.config.heads
        seen = [tokens_of(self.teacher, "teacher", heads, one) for one in big]
        self.of_class = _head(self.teacher, "teacher_head", torch.stack([one[0] for one in seen]))
        hidden = [one[1:][mask] for one, mask in zip(seen, masks, strict=True)]
        self.of_patch = _head(self.teacher, "teacher_head", torch.cat(hidden))
        ours = [tokens_of(student, "student", heads, one, mask) for one, mask in zip(big, masks, strict=True)]
        classes = [one[0] for one in ours] + [tokens_of(student, "student", heads, one)[0] for one in small]
        guesses = _head(student, "student_head", torch.stack(classes)).unflatten(0, (-1, images))
        hidden = torch.cat([one[1:][mask] for one, mask in zip(ours, masks, strict=True)])
        told = _targets(self.of_class, self.class_centre).unflatten(0, (2, images))
        pairs = [(t, s) for t in range(2) for s in range(len(guesses)) if s != t]
        of_class = torch.stack([_cross_entropy(told[t], guesses[s]) for t, s in pairs]).mean()
        of_patch = _cross_entropy(_targets(self.of_patch, self.patch_centre), _head(student, "student_head", hidden))
        return of_class, of_patch

    def follow(self, student: dict[str, Tensor], progress: float) -> None:
        """The teacher moves towards the student, the centres towards this step's logits."""
        kept = 1 - (1 - self.config.teacher_momentum) * (1 + math.cos(math.pi * progress)) / 2
        for name, old in self.teacher.items():
            self.teacher[name] = kept * old + (1 - kept) * student["student" + name.removeprefix("teacher")]
        self.class_centre = 0.9 * self.class_centre + 0.1 * self.of_class.mean(dim=0)
        self.patch_centre = 0.9 * self.patch_centre + 0.1 * self.of_patch.mean(dim=0)


def tokens_of(weights: dict[str, Tensor], name: str, heads: int, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Class token and patch tokens of one image after the last norm; the mask token where `mask`."""
    kernel = weights[f"{name}.patch_embed.proj.weight"].flatten(1)
    patch = round((kernel.shape[1] / 3) ** 0.5)
    x = patches_of(pixels, patch) @ kernel.T + weights[f"{name}.patch_embed.proj.bias"]
    if mask is not None:
        x = torch.stack([weights["mask_token"] if hidden else row for row, hidden in zip(x, mask, strict=True)])
    x = torch.cat([weights[f"{name}.cls_token"][0], x]) + _positions(weights[f"{name}.pos_embed"][0], 1 + len(x))
    depth = len({key.split(".blocks.")[1].split(".")[0] for key in weights if key.startswith(f"{name}.blocks.")})
    for number in range(depth):
        x = block(weights, f"{name}.blocks.{number}", x, heads)
    return norm(weights, f"{name}.norm", x)


def clipped(gradients: dict[str, Tensor], largest: float) -> dict[str, Tensor]:
    """Gradients whose norm, over all of them, is at most `largest`."""
    length = math.sqrt(sum(float((one**2).sum()) for one in gradients.values()))
    return {name: one * min(1.0, largest / length) for name, one in gradients.items()}


def _positions(table: Tensor, tokens: int) -> Tensor:
    """Those of a grid of this many tokens, bicubic from the table's own."""
    own, side = round((len(table) - 1) ** 0.5), round((tokens - 1) ** 0.5)
    square = table[1:].T.reshape(1, -1, own, own)
    fitted = F.interpolate(square, (side, side), mode="bicubic", antialias=True) if own != side else square
    return torch.cat([table[:1], fitted.flatten(2)[0].T])


def _head(weights, name: str, x: Tensor) -> Tensor:
    for layer, batch_norm in (("0", "1"), ("3", "4")):
        x = x @ weights[f"{name}.mlp.{layer}.weight"].T
        x = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt()
        x = x * weights[f"{name}.mlp.{batch_norm}.weight"] + weights[f"{name}.mlp.{batch_norm}.bias"]
        x = x * (1 + torch.erf(x / 2**0.5)) / 2
    x, prototypes = linear(weights, f"{name}.mlp.6", x), weights[f"{name}.prototypes"]
    return (x / x.norm(dim=1, keepdim=True)) @ (prototypes / prototypes.norm(dim=1, keepdim=True)).T


def _targets(logits: Tensor, centre: Tensor) -> Tensor:
    centred = logits - centre
    return (centred / (0.4 * (centred**2).mean().sqrt())).softmax(dim=-1)


def _cross_entropy(told: Tensor, guessed: Tensor) -> Tensor:
    return -(told * (guessed / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return (1 - (one * other).sum(dim=-1) / (one.norm(dim=-1) * other.norm(dim=-1))).mean()
