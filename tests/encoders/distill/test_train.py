"""Self-distillation: its formulas, its interruption, and what it writes."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from reference import distillation as slow
from stripes import draw_stripes, tiny
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from encoders.distill import losses
from encoders.distill.train import distill, new_objective, new_optimizer
from encoders.load import load_encoder
from training.batch_norm import BatchNorm
from training.checkpoint import find, load_state, load_tensors, newest
from training.metrics import read_metrics


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of torch wait for each other longer than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_stripes(tmp_path_factory.mktemp("stripes") / "images", 40)


def distribution(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).softmax(dim=-1)


def test_class_loss_is_dinos_double_loop():
    student, teacher = torch.randn(5, 3, 7), distribution(2, 3, 7)

    assert losses.class_loss(student, teacher).item() == pytest.approx(slow.class_loss(student, teacher), rel=1e-4)


def test_patch_loss_is_the_mean_cross_entropy_at_masked_patches():
    student, teacher = torch.randn(9, 7), distribution(9, 7)

    assert losses.patch_loss(student, teacher).item() == pytest.approx(slow.patch_loss(student, teacher), rel=1e-4)


def test_a_centred_teacher_favours_what_it_seldom_says():
    logits, centre = torch.zeros(1, 3), torch.tensor([0.1, 0.0, 0.0])

    centred = losses.targets(logits, centre, 0.5)[0]

    assert centred[1] == pytest.approx(centred[2].item())
    assert (centred[1] / centred[0]).log().item() == pytest.approx(3**0.5 / 0.5, rel=1e-4)


def test_the_spread_tells_both_collapses_from_none():
    same = torch.full((8, 8), 1 / 8)
    one = torch.eye(8)[[0] * 8]
    apart = torch.eye(8)

    told = [losses.spread(teacher)["told_apart"] for teacher in (same, one, apart)]

    assert told == pytest.approx([0, 0, np.log(8)], abs=1e-5)


def test_the_teacher_follows_the_student(images, tmp_path):
    pair = new_objective(tiny(images, tmp_path, teacher_momentum=0.9))
    for weight in pair.student.parameters():
        torch.nn.init.normal_(weight)
    before = {name: weight.clone() for name, weight in pair.teacher.named_parameters()}

    pair.follow(0.0)

    for name, weight in pair.student.named_parameters():
        expected = 0.9 * before[name] + 0.1 * weight
        assert torch.allclose(pair.teacher.get_parameter(name), expected, atol=1e-6)


def test_the_optimizer_trains_the_student_and_never_the_teacher(images, tmp_path):
    config = tiny(images, tmp_path)
    pair = new_objective(config)

    trained = {id(weight) for group in new_optimizer(pair, config).param_groups for weight in group["params"]}

    student = [*pair.student.parameters(), *pair.student_head.parameters(), pair.mask_token]
    assert trained == {id(weight) for weight in student}


def test_a_stopped_run_continues_to_the_same_weights_bit_for_bit(images, tmp_path):
    distill(tiny(images, tmp_path / "whole"))

    distill(tiny(images, tmp_path / "halves"), stop_after_steps=4)
    distill(tiny(images, tmp_path / "halves"))

    whole, halves = newest(tmp_path / "whole"), newest(tmp_path / "halves")
    assert whole.name == halves.name == "step-00000010"
    assert (whole / "model.safetensors").read_bytes() == (halves / "model.safetensors").read_bytes()
    expected, found = load_state(whole)["rest"], load_state(halves)["rest"]
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[line["loss_class"] for line in read_metrics(tmp_path / name)] for name in ("whole", "halves")]
    assert losses[0] == losses[1]


def test_training_lowers_both_losses(images, tmp_path):
    distill(tiny(images, tmp_path / "run", epochs=32))

    lines = read_metrics(tmp_path / "run")
    for name in ("loss_class", "loss_patch"):
        first, last = (np.mean([line[name] for line in part]) for part in (lines[:8], lines[-8:]))
        assert last < 0.95 * first
    assert lines[-1]["told_apart"] > 0.1


def test_the_checkpoint_is_the_teacher_and_loads_strictly_in_timm(images, tmp_path):
    distill(tiny(images, tmp_path / "run"))

    weights, metadata = load_tensors(find(tmp_path / "run"))
    vit = metadata["vit"]
    numbers = {name: vit[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    VisionTransformer(**numbers, num_classes=0).load_state_dict(weights, strict=True)

    encoder = load_encoder(f"run:{tmp_path / 'run'}", grid=6)
    tokens = encoder(torch.zeros(2, 24, 24, 3, dtype=torch.uint8))
    assert tokens.patch_tokens.shape == (2, 36, 32)


def test_a_finished_run_is_not_run_again(images, tmp_path):
    first = distill(tiny(images, tmp_path / "run"))

    assert distill(tiny(images, tmp_path / "run")) == first


def test_a_run_killed_before_its_report_gives_the_same_report_and_warning(tmp_path, capsys):
    """Of black images, which no encoder tells apart, and one that is no image."""
    (tmp_path / "black").mkdir()
    for number in range(40):
        Image.new("RGB", (24, 24)).save(tmp_path / "black" / f"{number}.png")
    (tmp_path / "black" / "torn.png").write_bytes(b"no image")
    config = tiny(str(tmp_path / "black"), tmp_path / "run")
    report, told = distill(config), capsys.readouterr().err
    (tmp_path / "run" / "DONE.json").unlink()

    again = distill(config)

    assert list(again) == list(report)
    assert again | {"seconds": 0} == report | {"seconds": 0}
    assert {"loss_class", "told_apart", "grad_norm"} <= set(report)
    assert report["unreadable"] == 1
    assert "(collapse)" in told
    assert "(collapse)" in capsys.readouterr().err


def test_no_epochs_leave_the_encoder_as_it_was_drawn(images, tmp_path):
    config = tiny(images, tmp_path / "run", epochs=0)

    report = distill(config)

    weights, _ = load_tensors(find(tmp_path / "run"))
    drawn = new_objective(config).teacher.state_dict()
    assert report["steps"] == 0
    assert all(torch.equal(weights[name], drawn[name]) for name in drawn)


@pytest.mark.parametrize("absent", ["local_crops", "mask_ratio"])
def test_it_trains_without_local_crops_and_without_masks(images, tmp_path, absent):
    report = distill(tiny(images, tmp_path / "run", epochs=1, **{absent: 0}))

    assert np.isfinite(report["loss_class"])
    assert (report["loss_patch"] == 0) == (absent == "mask_ratio")


def test_too_few_images_for_a_batch_are_told(images, tmp_path):
    with pytest.raises(ValueError, match="make no batch of 512"):
        distill(tiny(images, tmp_path / "run", batch_size=512))


def test_another_seed_draws_another_student(images, tmp_path):
    config = tiny(images, tmp_path)

    first, second = (new_objective(dataclasses.replace(config, seed=seed)).student.pos_embed for seed in (0, 1))

    assert not torch.equal(first, second)


def test_only_the_vits_and_the_mlp_of_the_head_compute_in_bf16(images, tmp_path):
    objective = new_objective(tiny(images, tmp_path, precision="bf16"))
    made = {}
    for name, module in objective.named_modules():
        if not isinstance(module, nn.Identity):
            module.register_forward_hook(lambda module, _, output, name=name: made.update({name: output.dtype}))

    losses = objective.losses(torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8), step=0)

    assert made["student.blocks.0.mlp.fc1"] == made["student_head.mlp.0"] == torch.bfloat16
    norms = [name for name in made if isinstance(objective.get_submodule(name), nn.LayerNorm | BatchNorm)]
    assert {made[name] for name in (*norms, "student_head", "teacher_head")} == {torch.float32}
    assert losses.of_class.dtype == losses.of_patch.dtype == torch.float32


def test_bf16_trains_as_fp32_does_and_saves_fp32(images, tmp_path):
    for precision in ("fp32", "bf16"):
        distill(tiny(images, tmp_path / precision, precision=precision))

    weights, _ = load_tensors(find(tmp_path / "bf16"))
    rest = load_state(newest(tmp_path / "bf16"))["rest"]
    full, half = (read_metrics(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert {tensor.dtype for tensor in (*weights.values(), *rest.values())} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in (*weights.values(), *rest.values()))
    for name in ("loss_class", "loss_patch"):
        assert half[0][name] == pytest.approx(full[0][name], rel=0.01)
        assert half[-1][name] == pytest.approx(full[-1][name], rel=0.1)
