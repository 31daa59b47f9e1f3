"""What the steps of the verb `encoder` receive and do, beside a slow twin of the whole."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import distillation_step as slow
from reference.vit import AdamW
from stripes import draw_stripes, tiny
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from watch import Watched, watching

from encoders.distill.config import EncoderConfig
from encoders.distill.train import distill, new_objective
from shards.order import permutation
from training import checkpoint
from training.metrics import read_metrics

STEPS = 5
"""Three epochs of ten images in batches of six."""
RATES = [0, 0.0046875, 0.004001178, 0.00234425, 0.000687322]
"""One step up to 0.2 · 6 / 256, then half a cosine down to 1e-6 over the other four."""
SETTINGS = {
    "local_crops": 2, "epochs": 3, "batch_size": 6, "base_lr": 0.2, "warmup_epochs": 0.6, "teacher_momentum": 0.8,
    "weight_decay": 0.3, "seed": 3,
}  # fmt: skip


@dataclass
class Run:
    """A run of the verb that was watched."""

    config: EncoderConfig
    watched: Watched
    images: list[torch.Tensor]
    """What was decoded for each step."""

    def crops(self, step: int) -> list[torch.Tensor]:
        return [arguments[0] for arguments in self.watched.inputs[3 * step : 3 * step + 3]]


def decoded(config: EncoderConfig, size: int) -> list[torch.Tensor]:
    """The images of each step: epoch after epoch in the orders of the seed, square as they are, at `size` pixels."""
    steps = []
    for step in range(STEPS):
        places = [divmod(place, 10) for place in range(6 * step, 6 * step + 6)]
        numbers = [permutation(10, seed=config.seed, epoch=epoch)[place] for epoch, place in places]
        images = [Image.open(Path(config.images) / f"{number}.png") for number in numbers]
        squares = [np.array(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]
        steps.append(torch.from_numpy(np.stack(squares)))
    return steps


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("wiring")
    config = tiny(draw_stripes(folder / "images", 10), folder / "run", **SETTINGS)
    with watching(PatchEmbed) as watched:
        distill(config)
    return Run(config, watched, decoded(config, 16))


def test_teacher_and_student_see_their_crops_of_the_steps_images_normalised(run):
    assert len(run.watched.inputs) == 3 * STEPS
    for step, images in enumerate(run.images):
        big, small, _ = slow.crops_of(images, run.config, step=step)
        for seen, expected in zip(run.crops(step), (big, big, small), strict=True):
            assert torch.allclose(seen, expected, atol=1e-5)


def test_the_rate_scales_with_the_batch_warms_up_and_falls_along_a_cosine(run):
    for rates, expected in zip(run.watched.rates(), RATES, strict=True):
        assert rates == pytest.approx([expected] * 2, rel=1e-6)


def test_matrices_decay_and_tokens_biases_norms_and_positions_do_not(run):
    objective = new_objective(run.config)
    trained = {name: one for name, one in objective.named_parameters() if not name.startswith("teacher")}
    matrices = {name for name, one in trained.items() if one.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))}
    for groups in run.watched.steps:
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
        assert [group["betas"] for group in groups] == [(0.9, 0.999)] * 2
        sizes = [sorted(one.shape for one in group["params"]) for group in groups]
        assert sizes[0] == sorted(trained[name].shape for name in matrices)
        assert sizes[1] == sorted(trained[name].shape for name in set(trained) - matrices)


def test_losses_teacher_and_centres_are_those_of_the_slow_twin(run):
    """Five steps in float64 from the same drawn weights."""
    twin = slow.SelfDistillation(new_objective(run.config).state_dict(), run.config)
    apart = ("cls_token", "pos_embed")
    matrices = {name for name, one in twin.student.items() if one.ndim > 1 and not name.endswith(apart)}
    optimizer = AdamW(twin.student, betas=(0.9, 0.999), decay=0.3, decayed=matrices)
    logged = read_metrics(run.config.run.out)
    for step, images in enumerate(run.images):
        big, _, small = (one.double() for one in run.crops(step))
        _, _, masks = slow.crops_of(images, run.config, step=step)
        leaves = {name: weight.detach().requires_grad_() for name, weight in optimizer.weights.items()}
        losses = twin.losses(leaves, big, small, masks)
        told = [logged[step][name] for name in ("loss_class", "loss_patch", "loss")]
        assert told == pytest.approx([one.item() for one in (*losses, sum(losses))], rel=1e-4)
        gradients = dict(zip(leaves, torch.autograd.grad(sum(losses), list(leaves.values())), strict=True))
        optimizer.step(slow.clipped(gradients, 3.0), RATES[step])
        twin.follow(optimizer.weights, step / STEPS)

    saved, _ = checkpoint.load_tensors(checkpoint.find(run.config.run.out))
    rest = checkpoint.load_state(checkpoint.newest(run.config.run.out))["rest"]
    for name in ("class_centre", "patch_centre"):
        assert torch.allclose(rest[name].double(), getattr(twin, name), atol=1e-5)
    for name, weight in saved.items():
        difference = (weight - twin.teacher[f"teacher.{name}"]).abs()
        if name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, which Adam makes a whole step
            difference = difference.unflatten(0, (3, -1))[[0, 2]]
        if name == "norm.bias":  # nor has what the head's batch normalisation takes away
            continue
        assert difference.max() < 2e-5, name


MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> tuple[Run, dict[str, torch.Tensor]]:
    """A run from a teacher whose pixels have a mean of their own, and the teacher's weights."""
    folder = tmp_path_factory.mktemp("taught")
    torch.manual_seed(0)
    weights = VisionTransformer(num_classes=0, **VIT).state_dict()
    weights = {name: one + 0.1 * torch.randn_like(one) for name, one in weights.items()}
    vit = VIT | {"mean": MEAN, "std": STD, "source": "test"}
    checkpoint.save(folder / "teacher", 1, weights, metadata={"vit": vit}, state={})
    images = draw_stripes(folder / "images", 10)
    settings = SETTINGS | {"teacher": f"run:{folder / 'teacher'}", "class_weight": 0.5}
    config = tiny(images, folder / "run", **settings)
    with watching(PatchEmbed) as watched:
        distill(config)
    return Run(config, watched, decoded(config, 32)), weights


def test_teacher_and_student_see_one_crop_each_by_its_own_mean_and_deviation(taught):
    run, _ = taught
    assert len(run.watched.inputs) == 2 * STEPS
    assert [groups[0]["lr"] for groups in run.watched.steps] == pytest.approx(RATES, rel=1e-6)
    for step, images in enumerate(run.images):
        ours, theirs = slow.pair_of(images, (16, 32), seed=3, step=step)
        (first,), (second,) = run.watched.inputs[2 * step : 2 * step + 2]
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        assert torch.allclose(first, ((255 * theirs).round() / 255 - mean) / std, atol=1e-5)
        mean, std = (torch.tensor(values)[:, None, None] for values in (slow.MEAN, slow.STD))
        assert torch.allclose(second, (ours - mean) / std, atol=1e-5)


def test_losses_from_a_teacher_are_those_of_the_slow_twin(taught):
    run, weights = taught
    twin = slow.FromTeacher(weights, heads=3)
    drawn = {name: one.double() for name, one in new_objective(run.config).named_parameters()}
    apart = ("cls_token", "pos_embed")
    matrices = {name for name, one in drawn.items() if one.ndim > 1 and not name.endswith(apart)}
    optimizer = AdamW(drawn, betas=(0.9, 0.999), decay=0.3, decayed=matrices)
    logged = read_metrics(run.config.run.out)
    for step in range(STEPS):
        seen, ours = (run.watched.inputs[2 * step + place][0].double() for place in range(2))
        leaves = {name: weight.detach().requires_grad_() for name, weight in optimizer.weights.items()}
        losses = twin.losses(leaves, 2, seen, ours, 0.5)
        told = [logged[step][name] for name in ("loss_class", "loss_patch", "loss")]
        assert told == pytest.approx([one.item() for one in (*losses, sum(losses))], rel=1e-4)
        gradients = dict(zip(leaves, torch.autograd.grad(sum(losses), list(leaves.values())), strict=True))
        optimizer.step(slow.clipped(gradients, 3.0), RATES[step])


def test_a_checkpoint_says_what_the_encoders_pixels_and_patches_were(run):
    _, told = checkpoint.load_tensors(checkpoint.find(run.config.run.out))

    assert told["vit"] == {
        "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "source": "encoder",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
