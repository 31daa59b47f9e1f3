"""What a pretraining does beside training: it measures and shows itself, keeps checkpoints, goes on for longer."""

import dataclasses
import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import write_set
from PIL import Image
from reference import mae_step
from watch import watching

from pretrain.config import PretrainConfig, StreamRun, config_of
from pretrain.health import effective_rank, feature_std
from pretrain.mae import MAE
from pretrain.pictures import BLANK, COLUMNS
from pretrain.presets import settled
from pretrain.replay import replay
from pretrain.train import Pretraining, pretrain
from shards.order import permutation
from shards.shard_set import ShardSet
from training import checkpoint
from training.contact_sheet import CELL, GAP, HEADER, ROWS
from training.metrics import read_metrics

IMAGES, BATCH, STEPS = 40, 12, 7
"""Two epochs: the first ends in the fourth step, the second in the last."""
EPOCH_OF = {4: 0, 7: 1}
"""The epoch of the first sample of the last step taken."""
SETTINGS = {
    "patch": 8, "embed_dim": 32, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
    "epochs": 2, "warmup_epochs": 0.3, "batch_size": BATCH, "base_lr": 1e-2,
}  # fmt: skip


def config(data: Path, out: Path, *, run: dict | None = None, **changes) -> PretrainConfig:
    where = StreamRun(out=out, device="cpu", precision="fp32", **run or {})
    return PretrainConfig(data=str(data), run=where, **SETTINGS | changes)


def same_weights(*runs: Path) -> bool:
    one, other = (checkpoint.load_tensors(checkpoint.find(run))[0] for run in runs)
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def painted(folder: Path) -> str:
    """Class folders of plain images of the class's colour, with noise."""
    random = np.random.default_rng(0)
    for name, colour in (("blue", (20, 30, 220)), ("red", (220, 30, 20))):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.clip(random.normal(colour, 12, (24, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same pretraining alone, and watched with everything, in two sittings."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_set(folder / "shards", count=IMAGES)
    pretrain(config(data, folder / "alone"))
    watched = config(
        data, folder / "watched", run={"knn": painted(folder / "classes"), "knn_every": 1, "keep_every": 1}
    )
    pretrain(watched, stop_after_steps=2)
    pretrain(watched)
    return folder


def test_whatever_is_measured_and_shown_the_weights_are_the_same(runs):
    assert same_weights(runs / "watched", runs / "alone")
    alone, watched = (read_metrics(runs / name)[-1] for name in ("alone", "watched"))
    for name in ("loss", "grad_norm", "effective_rank", "feature_std"):
        assert alone[name] == watched[name]


def test_features_are_measured_at_the_start_and_the_end_and_knn_every_few_epochs_too(runs):
    alone, watched = (read_metrics(runs / name) for name in ("alone", "watched"))

    assert [line["step"] for line in alone if "effective_rank" in line] == [0, STEPS - 1]
    assert [line["step"] for line in watched if "knn" in line] == [0, 3, STEPS - 1]
    assert not any("knn" in line for line in alone)
    assert all(0 <= line["waiting"] <= 1 for line in watched)
    assert json.loads((runs / "watched/DONE.json").read_text())["knn"] == watched[-1]["knn"]
    assert watched[-1]["knn"] > 0.9  # a colour tells the classes apart, even to weights that are hardly trained


def test_a_checkpoint_an_epoch_stays_with_its_pictures(runs):
    kept = [path.name for path in sorted((runs / "watched/checkpoints").iterdir())]
    assert kept == ["step-00000004", "step-00000007"]
    assert all((runs / "watched/checkpoints" / name / "stays").is_file() for name in kept)
    assert [path.stem for path in sorted((runs / "watched/pictures").iterdir())] == kept
    assert [path.stem for path in (runs / "alone/pictures").iterdir()] == ["step-00000007"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_of_the_newest_checkpoints_are_kept_as_the_run_is_told(keep, runs, tmp_path):
    pretrain(config(runs / "shards", tmp_path, run={"keep_last": keep, "checkpoint_minutes": 0}), stop_after_steps=4)

    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (1, 2, 3, 4)][-keep:]


def test_a_run_that_would_keep_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        config(tmp_path, tmp_path, run={"keep_last": 0})


def middles(sheet: Image.Image, column: str, row: int) -> list[tuple[int, ...]]:
    """The middle pixel of each of the 4 x 4 patches of a tile."""
    left, top = GAP + (CELL + GAP) * COLUMNS.index(column), HEADER + (CELL + GAP) * row
    places = [CELL // 8 + CELL // 4 * place for place in range(4)]
    return [sheet.getpixel((left + x, top + y)) for y in places for x in places]


@pytest.mark.parametrize("step", [4, 7])
def test_the_pictures_are_of_the_first_images_under_the_masks_of_their_step(step, runs):
    stored = dataclasses.replace(config(runs / "shards", runs / "watched"), flip=False)
    with ShardSet.open(stored.data) as shards, Image.open(runs / f"watched/pictures/step-{step:08d}.png") as sheet:
        for row, index in enumerate(sorted(permutation(IMAGES, seed=0, epoch=0)[:ROWS].tolist())):
            sample = shards.read(index)
            _, visible, _ = mae_step.shown(
                sample, stored, shards.groups, epoch=EPOCH_OF[step], progress=Fraction(step, STEPS)
            )
            image, seen, rebuilt = (middles(sheet, column, row) for column in COLUMNS)
            assert [patch for patch, colour in enumerate(seen) if colour != (BLANK,) * 3] == visible
            assert [seen[patch] for patch in visible] == [image[patch] for patch in visible]
            apart = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in zip(rebuilt, image, strict=True)]
            assert all(apart[patch] <= 1 for patch in visible)
            assert max(apart) > 5  # what was not seen was not copied
        with Image.open(runs / "alone/pictures/step-00000007.png") as alone:
            assert (alone.tobytes() == sheet.tobytes()) == (step == 7)


def test_an_encoder_that_says_the_same_of_every_image_is_seen(runs):
    settings = config(runs / "shards", runs / "alone")
    with ShardSet.open(settings.data) as shards:
        task = Pretraining(settings, shards)
        healthy = task.health.figures(task.model.encoder, 0)
        task.model.encoder.norm.weight.data.zero_()
        task.model.encoder.norm.bias.data.fill_(0.5)
        collapsed = task.health.figures(task.model.encoder, 0)

    assert collapsed == {"effective_rank": pytest.approx(1, abs=1e-3), "feature_std": pytest.approx(0, abs=1e-6)}
    assert healthy["effective_rank"] > 1.5
    assert healthy["feature_std"] > 1e-3


def test_what_is_measured_is_the_spread_of_the_mean_patch_tokens_of_whole_images(runs):
    last = read_metrics(runs / "alone")[-1]
    settings = config(runs / "shards", runs / "alone")
    with ShardSet.open(settings.data) as shards:
        model = Pretraining(settings, shards).model
        model.load_state_dict(checkpoint.load_tensors(checkpoint.find(runs / "alone"))[0])
        stored = dataclasses.replace(settings, flip=False)
        shown = (mae_step.shown(shards.read(n), stored, 4, epoch=0, progress=Fraction(0)) for n in range(IMAGES))
        images = torch.stack([pixels for pixels, _, _ in shown]).float()
        with torch.no_grad():
            features = model.encoder.forward_features(images)[:, 1:].mean(dim=1).double().numpy()

    values = np.linalg.svd(features, compute_uv=False)
    share = values / values.sum()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert last["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in share if p)), rel=1e-3)
    assert last["feature_std"] == pytest.approx(unit.std(axis=0, ddof=1).mean(), rel=1e-3)


def test_the_effective_rank_counts_directions_and_features_that_are_not_finite_have_none():
    assert effective_rank(torch.eye(6)) == pytest.approx(6, rel=1e-4)
    assert effective_rank(torch.eye(6)[:, :3].repeat(2, 1)) == pytest.approx(3, rel=1e-4)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1, rel=1e-4)
    assert effective_rank(torch.zeros(9, 4)) == pytest.approx(1, rel=1e-4)
    assert math.isnan(effective_rank(torch.full((9, 4), torch.inf)))
    assert feature_std(torch.ones(9, 4)) == 0


@pytest.mark.parametrize("knn", ["nowhere", "flat"])
def test_a_folder_that_knn_cannot_use_is_refused_before_the_first_step(knn, make_shards, tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/0.png")

    with pytest.raises((ValueError, FileNotFoundError), match=knn):
        pretrain(config(make_shards().path, tmp_path / "run", run={"knn": str(tmp_path / knn)}))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_two_ranks_go_on_where_one_stopped_and_one_where_they_did_and_all_see_the_samples_of_one(runs, tmp_path):
    """Meanwhile the main rank alone measures features and draws, which the other one waits for."""
    mixed = config(runs / "shards", tmp_path / "mixed")
    pretrain(mixed, stop_after_steps=2)
    script = tmp_path / "rank.py"
    script.write_text(
        "from pathlib import Path\nfrom pretrain.config import PretrainConfig, StreamRun\n"
        "from pretrain.train import pretrain\n"
        f"run = StreamRun(out=Path({str(tmp_path / 'mixed')!r}), device='cpu', precision='fp32', keep_every=1, "
        f"knn={str(runs / 'classes')!r}, knn_every=1)\n"
        f"pretrain(PretrainConfig(data={mixed.data!r}, run=run, **{SETTINGS!r}), stop_after_steps=5)\n"
    )
    for rank in warm.ranks(2, script):
        done = rank.finished()
        assert done.returncode == 0, done.stderr[-2000:]
    pretrain(mixed)

    one, other = (checkpoint.load_tensors(checkpoint.find(run))[0] for run in (runs / "alone", tmp_path / "mixed"))
    for name in one:
        apart = (one[name] - other[name]).abs()
        if name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, which Adam makes a whole step
            apart = apart.unflatten(0, (3, -1))[[0, 2]]
        assert apart.max() < 1e-5, name
    assert [line["step"] for line in read_metrics(tmp_path / "mixed") if "knn" in line] == [3]
    assert (tmp_path / "mixed/pictures/step-00000004.png").is_file()


def test_a_finished_run_goes_on_for_more_epochs_and_says_what_that_means(make_shards, tmp_path, capfd):
    data = make_shards(count=IMAGES).path
    pretrain(config(data, tmp_path / "run", epochs=1))
    longer = settled({"data": str(data), "epochs": 3}, StreamRun(out=tmp_path / "run", device="cpu"), cuda=False)
    longer = dataclasses.replace(longer, run=config(data, tmp_path / "run").run)
    assert longer == config(data, tmp_path / "run", epochs=3)  # the warm-up is what it was

    with watching(MAE) as watched:
        pretrain(longer, stop_after_steps=6)
        report = pretrain(longer)

    peak = 1e-2 * BATCH / 256
    rates = [peak * (1 + math.cos(math.pi * (step - 1) / 9)) / 2 for step in range(4, 10)]
    assert [groups[0] for groups in watched.rates()] == pytest.approx(rates)
    assert report["steps"] == 10
    said = [line for line in capfd.readouterr().err.splitlines() if "raised" in line]
    assert said == [
        "--epochs is raised from 1 to 3: after 4 of now 10 steps the learning rate goes on at "
        f"{rates[0]:.3g}, where the shorter schedule had come down to 0, and progress, which masks that change with "
        "training follow, goes back from 1 to 0.4"
    ]
    assert config_of(tmp_path / "run").epochs == 3
    assert pretrain(longer) == json.loads(json.dumps(report))
    for epochs in (1, 2):
        with pytest.raises(ValueError, match=rf"epochs was 3, now {epochs}\); epochs may only be raised"):
            pretrain(config(data, tmp_path / "run", epochs=epochs))
    assert (tmp_path / "run/DONE.json").is_file()


def test_a_kill_in_a_checkpoint_and_a_torn_one_before_it_resume_to_the_same_weights(runs, tmp_path):
    broken = config(runs / "shards", tmp_path / "broken")
    for stop in (2, 4):
        pretrain(broken, stop_after_steps=stop)
    state = tmp_path / "broken/checkpoints/step-00000004/state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    half = tmp_path / "broken/checkpoints/.step-00000005.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(checkpoint.find(runs / "alone").read_bytes()[:999])

    pretrain(broken)

    assert same_weights(tmp_path / "broken", runs / "alone")
    assert not half.exists()


def test_a_step_is_computed_again_from_what_was_written(runs, tmp_path):
    settings = config(runs / "shards", tmp_path / "run")
    pretrain(settings, stop_after_steps=3)
    with watching(MAE) as watched:
        pretrain(settings, stop_after_steps=4)

    loss, norm = replay(tmp_path / "run/checkpoints/step-00000003")

    assert loss == watched.outputs[0].item()
    assert 0 < norm < math.inf


def test_a_step_that_is_not_finite_leaves_its_samples_and_replays(runs, tmp_path):
    spoilt = config(runs / "shards", tmp_path / "run", base_lr=1e30, epochs=6, warmup_epochs=0)
    with pytest.raises(FloatingPointError):
        pretrain(spoilt)

    asides = sorted((tmp_path / "run/nonfinite").iterdir())
    assert len(asides) == 3
    told, number = json.loads((asides[0] / "samples.json").read_text()), int(asides[0].name[-8:])
    (rank,) = told["ranks"]
    assert list(zip(rank["epochs"], rank["indices"], strict=True)) == mae_step.taken(IMAGES, number, spoilt)
    assert (told["step"], rank["rank"], rank["seed"]) == (number, 0, 0)
    assert rank["keys"] == [f"{index:08d}" for index in rank["indices"]]
    assert math.isnan(replay(asides[0])[1])


def test_the_folder_of_another_verb_is_no_pretraining(tmp_path):
    (tmp_path / "config.json").write_text('{"verb": "EncoderConfig", "run": {}}')

    with pytest.raises(ValueError, match="is not the folder of a pretraining"):
        replay(tmp_path / "nonfinite/step-00000001")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["pretrain.replay"], 2, "python -m pretrain.replay RUN/nonfinite/step-NNNNNNNN"),
        (["pretrain.replay", "--help"], 2, "python -m pretrain.replay RUN/nonfinite/step-NNNNNNNN"),
        (["pretrain.replay", "nowhere/nonfinite/step-00000001"], 2, "nowhere/config.json: No such file or directory"),
        (["pretrain.replay", "run/nonfinite/step-00000001"], 2, "run/nonfinite/step-00000001"),
        (
            ["pipeline.figures.masks_sheet", "masks.png"],
            2,
            "python -m pipeline.figures.masks_sheet masks.png runs/random",
        ),
        (["pipeline.figures.masks_sheet", "masks.png", "nowhere"], 2, "nowhere/config.json: No such file or directory"),
        (["pipeline.figures.masks_sheet", "masks.png", "run"], 1, "run holds no whole checkpoint yet"),
    ],
)
def test_a_module_that_is_run_by_itself_answers_as_a_verb_does(arguments, status, said, runs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_bytes((runs / "alone/config.json").read_bytes())

    done = warm.python("-m", *arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path.cwd())}).finished()

    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(arguments) == 1 or said.startswith("python -m") or done.stderr.count("\n") == 1
