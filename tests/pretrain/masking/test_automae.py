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
from reference import automae as twin
from reference import mae_step
from reference.vit import AdamW
from watch import Watched, watching

from pretrain.config import PretrainConfig, StreamRun
from pretrain.masking.automae import AutoMAE
from pretrain.masking.discriminator import CORNERS
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
