"""HPM beside a slow twin from its paper, and what its runs keep to beside what every masking does."""

import dataclasses
import signal
import time
from pathlib import Path

import pytest
import torch
import warm
from hypothesis import given
from hypothesis import strategies as st
from reference import hpm as twin
from reference import mae_step
from some_inputs import TINY, inputs_of
from torch import Tensor, nn
from watch import watching

from pretrain.config import PretrainConfig, StreamRun
from pretrain.mae import MAE
from pretrain.masking import hpm
from pretrain.masking.hpm import HardPatches
from pretrain.masking.inputs import Inputs
from pretrain.objective import Objective
from pretrain.train import Pretraining, build, pretrain
from shards.shard_set import ShardSet
from training import checkpoint
from training.augment import normalised, unit
from training.metrics import read_metrics

SIZES = TINY | {"depth": 2, "heads": 4, "decoder_depth": 2}


def made(inputs: Inputs, **changes) -> tuple[MAE, HardPatches]:
    """An autoencoder and HPM's networks, every weight drawn again so that no two are alike."""
    config = dataclasses.replace(inputs.config, **changes)
    mae = build(config, 8 * inputs.shape[0])
    masking = HardPatches(config, mae, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in [*mae.named_parameters(), *masking.named_parameters()]:
            if not name.endswith("pos_embed"):
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return mae, masking


def doubled(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().double() for name, weight in module.named_parameters()}


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("share", "micro_batch"), [(1.0, None), (0.75, 2)])
def test_the_teachers_hardest_patches_are_masked_and_others_at_random(progress, share, micro_batch):
    inputs = inputs_of("hpm", images=3, shape=(4, 4), keep_share=share, mask_ratio=0.7, hard_share=0.8, **SIZES)
    run = StreamRun(out=Path("x"), precision="fp32", micro_batch=micro_batch)
    masking = made(inputs, run=run)[1]
    teacher, predictor = doubled(masking.teacher), doubled(masking.teacher_predictor)

    masked = masking.masked(inputs, progress)

    for row, pixels in enumerate(normalised(unit(torch.from_numpy(inputs.batch.images)).double())):
        kept = inputs.kept[row].tolist()
        guessed = twin.guesses(predictor, inputs.config, mae_step.tokens(teacher, inputs.config, pixels, kept, []))
        places = twin.mask([one.item() for one in guessed], inputs.noise[row].tolist(), inputs.masked, progress, 0.8)
        assert set(masked.ids_masked[row].tolist()) == {kept[place] for place in places}
        assert masked.extra[0][row, kept].tolist() == pytest.approx([one.item() for one in guessed], abs=1e-5)
    assert masking.figures()["hard"] == int(inputs.masked * progress * 0.8) / inputs.masked


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_and_where_its_gradient_goes_are_the_papers(norm_pix_loss):
    inputs = inputs_of("hpm", images=2, shape=(4, 4), predicted=5, norm_pix_loss=norm_pix_loss, **SIZES)
    mae, masking = made(inputs)
    masked = masking.masked(inputs, 0.5)
    pixels = normalised(unit(masked.images))

    loss = masking.loss(mae, pixels, masked.ids_visible, masked.ids_predicted, *masked.extra)
    loss.backward()
    pixels_alone = mae(pixels, masked.ids_visible, masked.ids_predicted)

    leaves = [
        {name: weight.detach().double().requires_grad_(weight.requires_grad) for name, weight in one}
        for one in (mae.named_parameters(), masking.predictor.named_parameters())
    ]
    ids = masked.ids_visible.tolist(), masked.ids_predicted.tolist()
    expected = twin.loss(*leaves, inputs.config, list(zip(pixels.double(), *ids, strict=True)))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert masking.figures()["order_loss"] == pytest.approx(loss.item() - pixels_alone.item(), rel=1e-5)
    assert masking.figures()["reconstruction"] == pytest.approx(pixels_alone.item(), rel=1e-5)
    for module, weights in zip((mae, masking.predictor), leaves, strict=True):
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                assert torch.allclose(weight.grad.double(), weights[name].grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(("progress", "decay"), [(0.0, 0.999), (0.25, 0.99945), (0.5, 0.9999), (1.0, 0.9999)])
def test_the_teacher_follows_encoder_and_predictor_more_slowly_over_a_hundred_epochs(progress, decay):
    mae, masking = made(inputs_of("hpm", **SIZES), epochs=200)
    pairs = [(masking.teacher, mae), (masking.teacher_predictor, masking.predictor)]
    before = [(doubled(teacher), doubled(trained)) for teacher, trained in pairs]

    masking.accept(mae, progress)

    for (teacher, trained), (old, new) in zip(pairs, before, strict=True):
        assert {name: weight.tolist() for name, weight in doubled(trained).items()} == {
            name: weight.tolist() for name, weight in new.items()
        }
        for name, weight in teacher.named_parameters():
            expected = decay * old[name] + (1 - decay) * new[name]
            assert torch.allclose(weight.double(), expected, rtol=0, atol=3e-7), name
        assert not any(weight.requires_grad for weight in teacher.parameters())
    assert {"encoder.patch_embed.proj.weight", "decoder_embed.weight", "mask_token"} <= before[0][0].keys()


@given(seed=st.integers(0, 99), patches=st.integers(2, 9))
def test_kendalls_tau_counts_pairs_in_the_same_and_the_other_order(seed, patches):
    generator = torch.Generator().manual_seed(seed)
    guessed, true = torch.randn(2, 3, patches, generator=generator)
    true[0, 1] = true[0, 0]
    true[0, 0] += patches == 2  # or there is no pair

    found = hpm.tau(guessed, true).item()

    taus = [twin.tau(*rows) for rows in zip(guessed.tolist(), true.tolist(), strict=True)]
    assert found == pytest.approx(sum(taus) / 3, abs=1e-6)
    assert hpm.tau(true, true).item() == 1


def test_one_predicted_patch_has_no_order_to_learn():
    one = torch.ones(3, 1, requires_grad=True)

    assert hpm.order_loss(one, torch.rand(3, 1)).item() == 0
    assert hpm.tau(one, torch.rand(3, 1)).item() == 0


RUN = TINY | {"masking": "hpm", "hard_share": 1.0, "epochs": 2, "warmup_epochs": 0, "batch_size": 12, "base_lr": 1e-2}


def config(data: Path, out: Path, micro_batch: int | None = None, **changes) -> PretrainConfig:
    run = StreamRun(out=out, device="cpu", precision="fp32", micro_batch=micro_batch)
    return PretrainConfig(data=str(data), run=run, **RUN | changes)


def weights(run: Path) -> dict[str, Tensor]:
    return checkpoint.load_tensors(checkpoint.find(run))[0]


def test_a_run_masks_more_hard_patches_as_it_goes_on_and_its_teacher_follows(make_shards, tmp_path):
    with watching(Objective) as watched:
        pretrain(config(make_shards().path, tmp_path / "run"))

    assert len(watched.inputs) == 7
    for step, (_, visible, predicted, losses) in enumerate(watched.inputs):
        hard = losses.argsort(dim=1, descending=True)[:, : int(12 * step / 7)]
        assert not (hard[:, :, None] == visible[:, None]).any()
        assert predicted.shape == (12, 12)
    first, last = read_metrics(tmp_path / "run")
    assert (first["hard"], last["hard"]) == (0, 10 / 12)
    assert first["predictor_tau"] != last["predictor_tau"]
    assert all(-1 <= line[name] <= 1 for line in (first, last) for name in ("predictor_tau", "teacher_tau"))


def test_after_a_step_the_teacher_is_a_thousandth_of_the_way_to_what_was_trained(make_shards, tmp_path):
    with watching(Objective) as watched:
        pretrain(config(make_shards().path, tmp_path / "run"), stop_after_steps=1)

    after, pairs = weights(tmp_path / "run"), {"teacher": "mae.", "teacher_predictor": "masking.predictor."}
    for teacher, trained in pairs.items():
        for name in [name for name in after if name.startswith(f"masking.{teacher}.")]:
            own = trained + name.removeprefix(f"masking.{teacher}.")
            start, now = watched.initial[own], after[own.removeprefix("mae.")]
            assert torch.equal(after[name], start.lerp(now, 1 - 0.999)), name


def test_a_run_tells_its_teacher_how_far_it_is(make_shards, tmp_path):
    settings = config(make_shards().path, tmp_path / "run", epochs=60)
    with ShardSet.open(settings.data) as shards:
        task = Pretraining(settings, shards)
        assert isinstance(task.masking, HardPatches)
        token = task.masking.teacher.mask_token
        token.zero_()
        task.model.mask_token.data.fill_(1)

        task.accept(task.total // 2)

    decay = 0.999 + 30 / 100 * 0.0009
    assert token.flatten().tolist() == pytest.approx([1 - decay] * 16, rel=1e-4)


def test_the_log_tells_of_a_whole_step_whatever_its_micro_batches(make_shards, tmp_path):
    data = make_shards().path
    for name, micro_batch in (("one", None), ("pieces", 5)):
        pretrain(config(data, tmp_path / name, micro_batch), stop_after_steps=1)

    one, pieces = (read_metrics(tmp_path / name)[0] for name in ("one", "pieces"))
    for name in ("loss", "order_loss", "predictor_tau", "teacher_tau"):
        assert one[name] == pytest.approx(pieces[name], rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_of_hpm_goes_on_to_the_same_bits(make_shards, tmp_path):
    data, killed = make_shards().path, tmp_path / "killed"
    script = tmp_path / "one.py"
    script.write_text(
        "from pathlib import Path\nfrom pretrain.config import PretrainConfig, StreamRun\n"
        "from pretrain.train import pretrain\n"
        f"run = StreamRun(out=Path({str(killed)!r}), device='cpu', precision='fp32', checkpoint_minutes=0)\n"
        f"pretrain(PretrainConfig(data={str(data)!r}, run=run, **{RUN | {'epochs': 10}!r}))\n"
    )
    process = warm.python(script)
    deadline = time.monotonic() + 120
    while checkpoint.newest(killed) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)  # among writes: with no minutes between, it writes after every step
    process.wait(timeout=60)
    assert checkpoint.newest(killed) is not None
    assert not (killed / "DONE.json").is_file()

    pretrain(config(data, killed, epochs=10))
    pretrain(config(data, tmp_path / "straight", epochs=10))

    one, other = weights(killed), weights(tmp_path / "straight")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sum(name.startswith("masking.teacher") for name in one) > 30
