"""Distillation from a frozen teacher: what is learned, what is saved, and what is refused."""

import json
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from stripes import draw_stripes, tiny
from torch.nn import functional as F

from encoders.distill.from_teacher import WHITENED, cosine_loss, running_mean, told_apart, whitens
from encoders.distill.train import distill, new_objective, new_optimizer
from encoders.load import load_encoder
from encoders.tokens import vit_tokens
from encoders.whitening import whitening_from
from shards.image_batches import ImageBatches
from shards.images import list_images
from training.checkpoint import CheckpointError, find, load_state, load_tensors, newest
from training.damage import DIGESTS
from training.metrics import read_metrics

TEACHER = {"embed_dim": 48, "depth": 3, "heads": 3, "size": 32, "local_size": 16, "patch": 8}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_stripes(tmp_path_factory.mktemp("stripes") / "images", 64)


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    """A wider, deeper encoder of larger images and patches, self-distilled."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    distill(tiny(images, out, epochs=12, **TEACHER))
    return f"run:{out}"


@pytest.fixture(scope="module")
def learned(images, teacher, tmp_path_factory):
    """The run of a student."""
    out = tmp_path_factory.mktemp("student") / "run"
    distill(tiny(images, out, teacher=teacher, epochs=60, base_lr=0.1))
    return out


def squares(folder, size: int) -> torch.Tensor:
    with ImageBatches(list_images(folder), size=size, batch_size=64, seed=0) as batches:
        return next(iter(batches))[0]


def test_the_cosine_loss_forgets_lengths():
    tokens = torch.randn(3, 5, 7)

    losses = [cosine_loss(tokens, target).item() for target in (3 * tokens, -tokens)]

    assert losses == pytest.approx([0, 2], abs=1e-5)


def test_the_running_mean_is_the_mean_over_all_steps():
    steps, mean = torch.randn(6, 4, 5, 3), torch.zeros(3)

    for step, tokens in enumerate(steps):
        mean = running_mean(mean, tokens.mean(dim=(0, 1)), step=step)

    assert torch.allclose(mean, steps.mean(dim=(0, 1, 2)), atol=1e-6)


def test_told_apart_is_nothing_for_one_answer_and_one_for_answers_at_right_angles():
    told = [told_apart(predicted) for predicted in (torch.ones(4, 8), torch.cat([torch.eye(8), -torch.eye(8)]))]

    assert told == pytest.approx([0, 1], abs=1e-6)


def test_training_lowers_both_losses_and_tells_images_apart(learned):
    lines = read_metrics(learned)

    for name in ("loss_class", "loss_patch"):
        first, last = (np.mean([line[name] for line in part]) for part in (lines[:8], lines[-8:]))
        assert last < 0.6 * first
    assert lines[-1]["told_apart"] > 0.5


def test_held_out_tokens_of_the_teacher_are_predicted_better_than_from_an_untrained_student(
    images, teacher, learned, tmp_path
):
    distill(tiny(images, tmp_path / "untrained", epochs=0))
    unseen = draw_stripes(tmp_path / "unseen", 64, seed=1)
    theirs = [load_encoder(teacher, grid=4)(squares(folder, 32)) for folder in (images, unseen)]

    def missed(run, name: str) -> float:
        """1 - cosine, on unseen images, of the best linear map of the student's tokens found on the seen ones."""
        ours = [getattr(load_encoder(f"run:{run}")(squares(folder, 16)), name) for folder in (images, unseen)]
        x, z = (F.pad(tokens.flatten(0, -2), (0, 1), value=1.0).double() for tokens in ours)
        y, target = (getattr(tokens, name).flatten(0, -2).double() for tokens in theirs)
        weight = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1]), x.T @ (y - y.mean(dim=0)))
        return 1 - F.cosine_similarity(z @ weight, target - y.mean(dim=0), dim=-1).mean().item()

    for name in ("class_token", "patch_tokens"):
        fresh, trained = missed(tmp_path / "untrained", name), missed(learned, name)
        assert trained < 0.9 * fresh


def test_a_stopped_run_continues_to_the_same_weights_bit_for_bit(images, teacher, tmp_path):
    distill(tiny(images, tmp_path / "whole", teacher=teacher))

    distill(tiny(images, tmp_path / "halves", teacher=teacher), stop_after_steps=5)
    distill(tiny(images, tmp_path / "halves", teacher=teacher))

    whole, halves = newest(tmp_path / "whole"), newest(tmp_path / "halves")
    assert whole.name == halves.name == "step-00000016"
    assert (whole / "model.safetensors").read_bytes() == (halves / "model.safetensors").read_bytes()
    expected, found = load_state(whole)["rest"], load_state(halves)["rest"]
    assert found.pop("_extra_state") == expected.pop("_extra_state")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[line["loss_patch"] for line in read_metrics(tmp_path / name)] for name in ("whole", "halves")]
    assert losses[0] == losses[1]


def test_a_run_is_not_continued_on_another_teacher(images, tmp_path):
    teacher = tiny(images, tmp_path / "teacher", epochs=0)
    distill(teacher)
    config = tiny(images, tmp_path / "run", teacher=f"run:{tmp_path / 'teacher'}")
    distill(config, stop_after_steps=2)
    weights = find(tmp_path / "teacher")
    tensors, _ = load_tensors(weights)
    flipped = bytes(byte ^ 1 for byte in tensors["cls_token"].numpy().tobytes())
    weights.write_bytes(weights.read_bytes().replace(tensors["cls_token"].numpy().tobytes(), flipped))
    (weights.parent / DIGESTS).unlink()  # else it is seen to be torn

    with pytest.raises(CheckpointError, match="not those this run began with"):
        distill(config)


def test_the_checkpoint_is_the_student_and_says_what_a_self_distilled_one_says(images, learned, tmp_path):
    distill(tiny(images, tmp_path / "alone", epochs=0))

    weights, metadata = load_tensors(find(learned))
    expected, same = load_tensors(find(tmp_path / "alone"))
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in expected.items()}
    assert metadata == same
    assert load_encoder(f"run:{learned}", grid=6)(squares(images, 24)).patch_tokens.shape == (64, 36, 32)


def test_the_optimizer_trains_the_student_and_its_projections_and_never_the_teacher(images, teacher, tmp_path):
    config = tiny(images, tmp_path, teacher=teacher)
    objective = new_objective(config)

    trained = [weight for group in new_optimizer(objective, config).param_groups for weight in group["params"]]

    assert {id(weight) for weight in trained} == {id(weight) for weight in objective.parameters()}
    assert not any(weight.requires_grad for weight in objective.teacher.model.parameters())


def test_a_student_that_a_high_learning_rate_made_say_one_thing_is_told(images, teacher, tmp_path, capsys):
    distill(tiny(images, tmp_path / "run", teacher=teacher, epochs=12, base_lr=20.0))

    told = capsys.readouterr().err
    assert told.count("the encoder says the same of every image") == 1
    assert "--teacher-momentum" not in told


def test_a_student_blind_to_the_image_tells_none_apart(images, teacher, tmp_path):
    objective = new_objective(tiny(images, tmp_path, teacher=teacher))
    before = objective.losses(squares(images, 32), step=0).shown["told_apart"]
    torch.nn.init.zeros_(objective.student.patch_embed.proj.weight)

    after = objective.losses(squares(images, 32), step=0).shown["told_apart"]

    assert before > 0.1
    assert after == pytest.approx(0, abs=1e-4)


def test_a_student_that_learns_well_is_not(images, teacher, tmp_path, capsys):
    distill(tiny(images, tmp_path / "run", teacher=teacher, epochs=12))

    assert "collapse" not in capsys.readouterr().err


def test_the_teacher_may_have_any_patch_and_more_prefix_tokens(images, tmp_path):
    report = distill(
        tiny(images, tmp_path / "run", teacher="random:vit_small_patch14_reg4_dinov2", epochs=1, batch_size=32)
    )

    assert np.isfinite(report["loss_patch"])
    assert json.loads((tmp_path / "run/config.json").read_text())["teacher"] == "random:vit_small_patch14_reg4_dinov2"


def test_a_student_of_all_the_teachers_blocks_begins_as_the_teacher(images, tmp_path):
    """LayerScale, mean and deviation included: the teacher gets its own."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28)
    scales = {name: torch.rand_like(weight) for name, weight in model.state_dict().items() if name.endswith("gamma")}
    torch.save(model.state_dict() | scales, tmp_path / "teacher.pth")
    teacher = f"timm:vit_small_patch14_dinov2={tmp_path / 'teacher.pth'}"
    config = tiny(images, tmp_path, teacher=teacher, teacher_blocks=tuple(range(12)), size=28)
    objective = new_objective(config)
    pixels = squares(images, 28)

    ours = vit_tokens(objective.student, objective.teacher.prepared(pixels))

    assert torch.allclose(ours[:, 1:], objective.teacher(pixels).patch_tokens, atol=1e-4)


def test_a_student_of_the_teachers_blocks_reads_what_the_teacher_reads(images, tmp_path):
    source = "random:vit_tiny_patch16_224"  # mean and deviation of 0.5
    distill(tiny(images, tmp_path, teacher=source, teacher_blocks=tuple(range(12)), size=32, epochs=0))

    pixels = squares(images, 32)
    ours, theirs = load_encoder(f"run:{tmp_path}", grid=2), load_encoder(source, grid=2)
    assert torch.allclose(ours(pixels).patch_tokens, theirs(pixels).patch_tokens, atol=1e-4)


def test_without_a_class_weight_patches_alone_are_learned(images, teacher, tmp_path):
    objective = new_objective(tiny(images, tmp_path, teacher=teacher, class_weight=0.0))

    losses = objective.losses(squares(images, 32), step=0)
    (losses.of_class + losses.of_patch).backward()

    assert losses.of_class == 0
    assert not objective.class_projection.weight.grad.any()
    assert objective.patch_projection.weight.grad.any()
    assert losses.shown["told_apart"] > 0.02


def test_a_student_of_some_blocks_learns_and_loads_as_a_plain_vit(images, teacher, tmp_path):
    report = distill(tiny(images, tmp_path / "run", teacher=teacher, teacher_blocks=(0, 2), size=32, epochs=12))

    lines = read_metrics(tmp_path / "run")
    encoder = load_encoder(f"run:{tmp_path / 'run'}", grid=6)
    assert (encoder.patch, encoder.dim, encoder.depth, encoder.heads) == (8, 48, 2, 3)
    assert report["loss_patch"] < 0.6 * lines[0]["loss_patch"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_blocks": (0,)}, "needs the --teacher"),
        ({"teacher": "random:vit_tiny_patch16_224", "teacher_blocks": (12,)}, "between 0 and 11"),
        ({"teacher": "random:vit_small_patch14_reg4_dinov2", "teacher_blocks": (0,), "size": 28}, "no registers"),
    ],
)
def test_blocks_that_no_plain_vit_can_begin_as_are_refused(images, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        new_objective(tiny(images, tmp_path, **settings))


def test_bf16_trains_and_saves_fp32(images, teacher, tmp_path):
    for precision in ("fp32", "bf16"):
        distill(tiny(images, tmp_path / precision, teacher=teacher, precision=precision))

    weights, _ = load_tensors(find(tmp_path / "bf16"))
    full, half = (read_metrics(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(weight.isfinite().all() for weight in weights.values())
    for name in ("loss_class", "loss_patch"):
        assert half[-1][name] == pytest.approx(full[-1][name], rel=0.1)


def test_the_whitening_is_of_tokens_never_older_than_a_twentieth_of_the_steps():
    steps = [step for step in range(10_000) if whitens(step)]

    assert steps[:20] == list(range(20))
    assert len(steps) == 147
    assert all(after <= 1.05 * (before + 1) for before, after in pairwise(steps))


def test_the_loss_whitens_by_the_statistics_of_the_last_step_that_found_a_whitening(images, teacher, tmp_path):
    objective = new_objective(tiny(images, tmp_path, teacher=teacher))
    pixels = squares(images, 32)
    objective.losses(pixels, step=0)
    expected = whitening_from(objective.covariance, 48 // WHITENED)
    assert torch.equal(objective.whitening, expected)

    objective.losses(pixels, step=24)  # finds none

    assert not whitens(24)
    assert not torch.equal(objective.covariance @ expected, torch.zeros_like(expected))
    assert torch.equal(objective.whitening, expected)


def test_a_half_done_run_of_before_the_whitening_was_kept_goes_on(images, teacher, tmp_path):
    objective = new_objective(tiny(images, tmp_path, teacher=teacher))
    objective.losses(squares(images, 32), step=0)
    before = {name: value for name, value in objective.state_dict().items() if name != "whitening"}
    expected = objective.whitening.clone()
    objective.whitening.zero_()

    objective.load_state_dict(before)

    assert torch.equal(objective.whitening, expected)
