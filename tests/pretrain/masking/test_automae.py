"""AutoMAE beside a slow twin of the whole step, and who learns from what."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from conftest import drawn, write_samples
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference import automae as twin
from reference import mae_step
from reference.vit import AdamW
from some_inputs import inputs_of
from watch import Watched, watching

from pretrain.config import PretrainConfig, StreamRun
from pretrain.mae import MAE
from pretrain.masking.automae import AutoMAE, Generator, attention_shares, gumbel
from pretrain.masking.discriminator import CORNERS, Discriminator, rectangles
from pretrain.objective import Objective, new_masking
from pretrain.train import pretrain
from shards.rng import GUMBEL, MASK, RECTANGLE, uniform
from shards.shard_set import ShardSet
from training import checkpoint
from training.metrics import read_metrics

HEADS, STEPS, CELLS = 4, 4, 8
SMALL: dict[str, Any] = {
    "patch": 8, "embed_dim": 16, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
    "batch_size": 12, "epochs": 2, "base_lr": 0.1, "warmup_epochs": 0, "seed": 5, "masking": "automae", "flip": False,
    "automae_gan_scale": 7.0, "automae_attention_scale": 9.0,
}  # fmt: skip


def shards_with_attention(folder: Path) -> Path:
    """24 images of 4x4 patches, and attention on 8x8 cells."""
    random, samples = np.random.default_rng(1), []
    for sample in drawn(24, 32, CELLS, 4, 3, seed=0):
        attn = random.integers(0, 255, (HEADS, CELLS, CELLS)).astype(np.uint8)
        attn[:, 3, 4] = 255
        peaks = random.random(HEADS).astype(np.float32) / 8
        samples.append(dataclasses.replace(sample, attn=attn, attn_peak=peaks))
    info = {"grid": CELLS, "groups": 4, "size": 32, "classes": ["a", "b", "c"], "heads": HEADS}
    return write_samples(folder, samples, info, samples_per_shard=12)


def config(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    run = StreamRun(out=out, device="cpu", precision="fp32", micro_batch=changes.pop("micro_batch", None))
    return PretrainConfig(data=str(data), run=run, **SMALL | changes)


@dataclass
class Run:
    """A run of all its steps, watched, and what it read."""

    config: PretrainConfig
    watched: Watched
    shards: ShardSet
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("automae")
    settings = config(shards_with_attention(folder / "shards"), folder / "straight")
    with watching(Objective) as watched:
        pretrain(settings)
    with ShardSet.open(settings.data) as shards:
        yield Run(settings, watched, shards, folder)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(checkpoint.find(run))[0]


def assert_near(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], *, within: float) -> None:
    for name in one:
        difference = (one[name] - two[name]).abs()
        if name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, which Adam blows up to a whole step
            difference = difference.unflatten(0, (3, -1))[[0, 2]]
        assert difference.max().item() < within, name


def twin_steps(run: Run) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The same run in float64: of each step its masks and figures, and the weights at the end."""
    first = new_masking_of(run).state_dict(prefix="masking.")  # the watched discriminator has taken a step already
    initial = run.watched.initial | {name: one for name, one in first.items() if "discriminator" in name}
    state = {name: weight.double() for name, weight in initial.items() if not name.endswith("pos_embed")}
    judge = {name for name in state if "discriminator" in name and name.endswith("original")}
    trained = {name for name in state if "discriminator" not in name}
    decayed = {name for name in trained if name.endswith("weight") and "norm" not in name}
    mae = AdamW({name: state[name] for name in trained}, betas=(0.9, 0.95), decay=0.05, decayed=decayed)
    gan = AdamW({name: state[name] for name in judge}, betas=(0.9, 0.95), decay=0.0, decayed=set())
    rates, told = run.watched.rates(), []
    for step in range(STEPS):
        images, _, _, attention, _ = run.watched.inputs[step]
        rate = rates[2 * step][0]
        assert rates[2 * step + 1] == [rate, rate]
        draws = draws_of(run, step)
        leaves = {name: weight.detach().requires_grad_() for name, weight in mae.weights.items()}
        p_of = [(twin.logits(leaves, 9 * one.double()), row) for one, row in zip(attention, draws, strict=True)]
        fakes = [twin.probabilities(log_p.detach(), twin.gumbel(row["gumbel"][16:])) for log_p, row in p_of]
        reals = [twin.rectangle(row["rectangle"], 4, 4) for row in draws]
        kernels = {name: weight.detach().requires_grad_() for name, weight in gan.weights.items()}
        state |= kernels
        sharp = twin.kernels(state, iterate=True)
        on_real = torch.stack([twin.judged(sharp, 7 * real) for real in reals])
        on_fake = torch.stack([twin.judged(sharp, 7 * fake.reshape(4, 4)) for fake in fakes])
        loss = ((on_real - 1) ** 2).mean() + (on_fake**2).mean()
        gan.step(dict(zip(kernels, torch.autograd.grad(loss, list(kernels.values())), strict=True)), rate)
        state |= {name: weight.detach() for name, weight in gan.weights.items()}
        sharp = twin.kernels(state, iterate=False)
        losses, adversarial, ids, selected, flat = [], [], [], [], []
        own = [log_p.detach() for log_p, _ in p_of]
        for pixels, (log_p, row) in zip(images, p_of, strict=True):
            p = twin.probabilities(log_p, twin.gumbel(row["gumbel"][:16]))
            found = twin.scores(p, row["mask"], list(range(16)), 4)
            ids.append(twin.split(found, 4))
            selected += [patch in ids[-1][1] for patch in p.topk(4).indices.tolist()]
            flat.append(-(log_p.softmax(0) * log_p.log_softmax(0)).sum() / np.log(16))
            losses.append(twin.reconstruction(leaves, run.config, pixels.double(), *ids[-1], found))
            adversarial.append((twin.judged(sharp, 7 * p.reshape(4, 4)) - 1) ** 2)
        total = torch.stack(losses).mean() + 0.2 * torch.stack(adversarial).mean()
        mae.step(dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True)), rate)
        figures = {
            "d_real": on_real.mean(),
            "d_fake": on_fake.mean(),
            "reconstruction": torch.stack(losses).mean(),
            "adversarial": torch.stack(adversarial).mean(),
            "selected_masked": torch.tensor(selected).double().mean(),
            "entropy": torch.stack(flat).mean(),
            "own_share": 1 - torch.stack(own).mean(dim=0).var() / torch.stack(own).var(dim=1).mean(),
            "real_peak": torch.stack([real.max() for real in reals]).mean(),
            "fake_peak": torch.stack([fake.max() for fake in fakes]).mean(),
        }
        told.append({"ids": ids, "loss": total.item(), **{name: value.item() for name, value in figures.items()}})
    return told, mae.weights | gan.weights


def new_masking_of(run: Run) -> AutoMAE:
    masking = new_masking(run.config, run.watched.modules[0].mae, HEADS)
    assert isinstance(masking, AutoMAE)
    return masking


def draws_of(run: Run, step: int) -> list[dict[str, list[float]]]:
    counts = {"gumbel": (GUMBEL, 32), "mask": (MASK, 16), "rectangle": (RECTANGLE, CORNERS + 16)}
    indices, epochs = taken(run, step)
    every = {name: uniform(5, epochs, indices, *one).tolist() for name, one in counts.items()}
    return [{name: rows[image] for name, rows in every.items()} for image in range(12)]


def taken(run: Run, step: int) -> tuple[np.ndarray, np.ndarray]:
    epochs, indices = np.array(mae_step.taken(24, step, run.config)).T
    return indices, epochs


def test_masks_losses_and_weights_of_both_networks_are_those_of_the_slow_twin(run):
    told, last = twin_steps(run)

    for step, expected in enumerate(told):
        _, visible, predicted, _, _ = run.watched.inputs[step]
        assert [(one, other) for one, other in zip(visible.tolist(), predicted.tolist(), strict=True)] == expected[
            "ids"
        ]
        assert run.watched.outputs[step].item() == pytest.approx(expected["loss"], rel=1e-5)
    logged = read_metrics(run.folder / "straight")
    for line, expected in zip(logged, (told[0], told[-1]), strict=True):
        for name in expected.keys() - {"ids"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    found = {
        name if name.startswith("masking.") else f"mae.{name}": one
        for name, one in weights(run.folder / "straight").items()
    }
    assert_near(last, {name: found[name].double() for name in last}, within=2e-5)


@given(
    shape=st.sampled_from([(4, 4), (7, 7), (7, 14)]),
    ratio=st.sampled_from([0.4, 0.75, 0.85]),
    share=st.sampled_from([1.0, 0.5]),
    select=st.sampled_from(["visible", "masked"]),
    seed=st.integers(0, 99),
)
@hypothesis_settings(max_examples=8)
def test_masks_are_the_papers_on_every_grid_of_kept_patches(shape, ratio, share, select, seed):
    inputs = inputs_of(
        "automae", images=2, shape=shape, seed=seed, mask_ratio=ratio, keep_share=share, automae_select=select
    )
    masking, patches, kept = masking_for(inputs), shape[0] * shape[1], inputs.kept.shape[1]
    visible = int(kept * (1 - ratio))
    state = {f"masking.{name}": one.double() for name, one in masking.state_dict().items()}

    masks = masking.masked(inputs, 0.5)

    noise, drawn_gumbel = inputs.uniform(MASK, kept).tolist(), inputs.uniform(GUMBEL, patches).tolist()
    for row in range(2):
        attention = torch.from_numpy(inputs.batch.attention[row]).double()
        p = twin.probabilities(twin.logits(state, attention), twin.gumbel(drawn_gumbel[row]))
        selected = visible if select == "visible" else kept - visible
        found = twin.scores(p, noise[row], inputs.kept[row].tolist(), selected)
        assert (masks.ids_visible[row].tolist(), masks.ids_masked[row].tolist()) == twin.split(found, visible)


def masking_for(inputs: Any) -> AutoMAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoMAE(inputs.config, tiny_mae(), 3)


def tiny_mae(size: int = 32) -> MAE:
    sizes = {name: SMALL[name] for name in ("embed_dim", "depth", "heads", "decoder_dim", "decoder_depth")}
    return MAE(size=size, patch=8, decoder_heads=2, **sizes)


@given(shape=st.sampled_from([(4, 4), (7, 14), (14, 14), (28, 28)]), seed=st.integers(0, 10**6))
@hypothesis_settings(max_examples=20)
def test_rectangles_are_the_released_codes_and_as_large_a_share_of_other_grids(shape, seed):
    draws = torch.from_numpy(np.random.default_rng(seed).random((1, CORNERS + shape[0] * shape[1])))

    found = rectangles(draws, shape)

    torch.testing.assert_close(found[0].double(), twin.rectangle(draws[0].tolist(), *shape), rtol=1e-5, atol=0)


def test_the_generator_learns_from_visible_patches_alone():
    """At the noise n, d/dn_i = p_i (g_i - sum_j p_j g_j), where g_i is what reaches p_i: nothing where i is masked."""
    inputs = inputs_of("automae", images=3, shape=(4, 4))
    masking, mae = masking_for(inputs), tiny_mae()
    masks = masking.masked(inputs, 0.5)
    attention, noise = masks.extra
    noise.requires_grad_()

    loss = masking.loss(mae, torch.rand(3, 3, 32, 32), masks.ids_visible, masks.ids_predicted, attention, noise)
    p = (masking.generator(attention) + noise).softmax(dim=1)
    adversarial = 0.2 * (masking.discriminator(p.unflatten(1, (4, 4))) - 1).square().mean()
    (whole,), (judged,) = (torch.autograd.grad(one, noise) for one in (loss, adversarial))

    reached = ((whole - judged) / p).detach().double()
    visible, masked = (
        (reached - reached.gather(1, masks.ids_masked[:, :1])).gather(1, ids).abs()
        for ids in (masks.ids_visible, masks.ids_masked)
    )
    assert visible.min() > 10 * masked.max()


def test_what_reconstruction_teaches_the_generator_is_the_papers():
    """A discriminator that is shown next to nothing has next to no gradient."""
    inputs = inputs_of("automae", images=2, shape=(4, 4), automae_gan_scale=1e-12)
    masking, mae = masking_for(inputs), tiny_mae()
    masks, images = masking.masked(inputs, 0.5), torch.rand(2, 3, 32, 32)
    ours = dict(masking.generator.named_parameters(prefix="masking.generator"))
    state = {name: one.detach().double() for name, one in Objective(mae, masking).named_parameters()}
    leaves = {name: state[name].requires_grad_() for name in ours}

    loss = masking.loss(mae, images, masks.ids_visible, masks.ids_predicted, *masks.extra)
    found = torch.autograd.grad(loss, list(ours.values()))

    losses = []
    for row in range(2):
        attention, noise = (one[row].double() for one in masks.extra)
        factors = dict(enumerate(0.5 * twin.probabilities(twin.logits(state, attention), noise)))
        ids = masks.ids_visible[row].tolist(), masks.ids_masked[row].tolist()
        losses.append(twin.reconstruction(state, config(Path(), Path()), images[row].double(), *ids, factors))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    for name, one, other in zip(ours, found, expected, strict=True):
        assert other.abs().max() > 0
        assert (one - other).abs().max() < 1e-4 * other.abs().max(), name


def test_in_the_joint_step_neither_the_attention_nor_the_discriminator_learns():
    inputs = inputs_of("automae", images=3, shape=(4, 4))
    masking, mae = masking_for(inputs), tiny_mae()
    before = {name: one.clone() for name, one in masking.discriminator.state_dict().items()}
    masks = masking.masked(inputs, 0.5)

    loss = masking.loss(mae, torch.rand(3, 3, 32, 32), masks.ids_visible, masks.ids_predicted, *masks.extra)
    loss.backward()

    assert not any(one.requires_grad for one in masks.extra)
    for weight in masking.discriminator.parameters():
        assert weight.grad is None
        assert not weight.requires_grad
    assert all(torch.equal(one, before[name]) for name, one in masking.discriminator.state_dict().items())
    assert all(weight.grad.abs().max() > 0 for weight in masking.generator.parameters())


def test_in_its_own_step_the_discriminator_alone_learns():
    inputs = inputs_of("automae", images=3, shape=(7, 7))
    masking = masking_for(inputs)
    before = {name: one.clone() for name, one in masking.named_parameters()}

    masking.begin(inputs, 1e-2)

    changed = {name for name, one in masking.named_parameters() if not torch.equal(one, before[name])}
    assert changed == {name for name in before if name.startswith("discriminator")}
    assert all(
        weight.grad is None and (weight.requires_grad == ("generator" in name))
        for name, weight in masking.named_parameters()
    )


@pytest.mark.parametrize("cells", [(7, 14), (8, 8), (14, 28)])
def test_a_patch_has_its_share_of_the_attention_however_many_cells_are_stored(cells):
    inputs = inputs_of("automae", shape=(7, 14), cells=cells)

    found = attention_shares(inputs)

    assert found.shape == (4, 3, 7, 14)
    stored = torch.from_numpy(inputs.batch.attention)
    torch.testing.assert_close(found.sum(dim=(2, 3)), stored.sum(dim=(2, 3)))


def test_in_bf16_both_networks_compute_as_in_fp32():
    inputs = inputs_of("automae", images=3, shape=(4, 4))
    masking, mae = masking_for(inputs), tiny_mae()
    masks = masking.masked(inputs, 0.5)
    images = torch.rand(3, 3, 32, 32)

    with watching(Generator) as made, watching(Discriminator) as judged:
        for precise in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
                masking.loss(mae, images, masks.ids_visible, masks.ids_predicted, *masks.extra)

    for outputs in (made.outputs, judged.outputs):
        assert torch.equal(*outputs)


def test_noise_is_gumbels_and_finite_at_both_ends():
    ends = gumbel(torch.tensor([[0.0, 1 - 2.0**-24]]))
    many = gumbel(torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0)))

    assert ends.isfinite().all()
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert many.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.05)


def test_the_mends_take_the_peak_away_and_let_the_discriminator_reach_its_target():
    released, mended = (
        inputs_of("automae", images=8, **settings)
        for settings in ({}, {"automae_gan_input": "softmax", "automae_gan_scale": 196.0})
    )
    figures = []
    for inputs in (released, mended):
        masking = masking_for(inputs)
        for epoch in range(60):
            later = dataclasses.replace(inputs.batch, epochs=inputs.batch.epochs + epoch)
            masking.begin(dataclasses.replace(inputs, batch=later), 2.4e-3)
        masks = masking.masked(inputs, 0.5)
        masking.loss(tiny_mae(112), torch.rand(8, 3, 112, 112), masks.ids_visible, masks.ids_predicted, *masks.extra)
        figures.append(masking.figures())

    before, after = figures
    assert before["fake_peak"] > 10 * before["real_peak"]
    assert after["fake_peak"] < after["real_peak"]
    assert before["d_real"] < 0.3
    assert abs(before["d_real"] - before["d_fake"]) < 0.1
    assert after["d_real"] > 0.6
    assert after["d_fake"] < 0.4


RANK = """
import sys
from pathlib import Path
from pretrain.config import PretrainConfig, StreamRun
from pretrain.train import pretrain
from training import distributed
distributed.join("cpu")
run = StreamRun(out=Path(sys.argv[2]), device="cpu", precision="fp32", micro_batch=3)
pretrain(PretrainConfig(data=sys.argv[1], run=run, **eval(sys.argv[3])))
distributed.leave()
"""


@pytest.fixture(scope="module")
def others(run):
    """The same run by two ranks in micro-batches, and stopped twice on its way."""
    data = Path(run.config.data)
    (run.folder / "rank.py").write_text(RANK)
    ranks = warm.ranks(2, run.folder / "rank.py", data, run.folder / "ranks", repr(SMALL))
    for stop in (1, 3, None):
        pretrain(config(data, run.folder / "stopped"), stop_after_steps=stop)
    for rank in ranks:
        done = rank.finished()
        assert done.returncode == 0, done.stderr[-3000:]
    return run.folder


def test_a_stopped_run_goes_on_to_the_same_bits_of_weights_figures_and_both_optimizers(others):
    straight, stopped = (weights(others / name) for name in ("straight", "stopped"))
    one, two = (checkpoint.load_state(checkpoint.newest(others / name)) for name in ("straight", "stopped"))

    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    for name in ("exp_avg", "exp_avg_sq"):
        moments = [[row[name] for row in state["masking"]["state"].values()] for state in (one, two)]
        assert len(moments[0]) == 3
        assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))
    assert unlike_time(read_metrics(others / "straight")[-1]) == unlike_time(read_metrics(others / "stopped")[-1])


def test_ranks_and_micro_batches_change_nothing_but_rounding_in_weights_and_figures(others):
    assert_near(weights(others / "straight"), weights(others / "ranks"), within=2e-5)
    for one, other in zip(read_metrics(others / "straight"), read_metrics(others / "ranks"), strict=True):
        assert unlike_time(one) == pytest.approx(unlike_time(other), rel=2e-4, abs=1e-6)


def unlike_time(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("images_per_second", "waiting")}


def test_a_set_without_attention_is_refused_with_the_command_that_makes_it(make_shards, tmp_path):
    with pytest.raises(ValueError, match=r"no class attention; make it with `semmae extract --relabel .* --attention"):
        pretrain(config(make_shards().path, tmp_path / "run"))


@pytest.mark.parametrize("field", ["automae_attention_scale", "automae_gan_scale"])
def test_a_scale_of_nothing_is_a_sentence(field):
    with pytest.raises(ValueError, match=field):
        config(Path(), Path(), **{field: 0.0})


def test_a_step_of_the_discriminator_that_is_not_finite_is_left_out_told_once_and_counted(capfd):
    inputs = inputs_of("automae", images=4, shape=(4, 4), automae_gan_scale=1e38)
    masking = masking_for(inputs)
    before = [weight.clone() for weight in masking.discriminator.parameters()]

    for _ in range(2):
        masking.begin(inputs, 0.1)

    assert all(map(torch.equal, before, masking.discriminator.parameters()))
    assert masking.d_skipped == 2
    assert capfd.readouterr().err.count("the gradient of automae's discriminator is not finite") == 1
