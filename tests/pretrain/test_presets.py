"""Named runs, what follows without one, and what a folder keeps."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pretrain.config import FREE, METHOD, UNSET, PretrainConfig, StreamRun
from pretrain.presets import LARGE, PRESETS, SetShape, defaults, fitting, patch_of, settled
from pretrain.train import pretrain
from training.run_folder import RunFolder

IMAGENET = SetShape(1_281_167, 224, 28)


def run(out: Path) -> StreamRun:
    return StreamRun(out=out, device="cpu", precision="fp32")


def asked(data: Path, **given) -> dict:
    names = [field.name for field in fields(PretrainConfig) if field.name != "run"]
    return dict.fromkeys(names) | {"data": str(data), "seed": 0, "window": 0, "substitutes": 0} | given


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config_and_its_docstring_says_what_to_expect(name):
    config = PretrainConfig(data="x", preset=name, run=run(Path("x")), **PRESETS[name](IMAGENET))

    assert 224 % config.patch == 0
    assert 28 % (224 // config.patch) == 0
    assert (config.embed_dim, config.epochs) == (768, 800) or name in ("tiny", "small")
    for word in (f"Command: .*--preset {name} ", "Hardware: ", "Hours: ", "Expect: "):
        assert re.search(word, PRESETS[name].__doc__ or ""), word


def test_the_presets_of_the_config_are_those_there_are():
    named = get_args(get_type_hints(PretrainConfig)["preset"])[0]
    assert set(get_args(named)) == set(PRESETS)


def test_every_setting_of_a_run_is_fixed_by_a_preset_or_free_or_of_the_set():
    rest = {field.name for field in fields(PretrainConfig)} - set(METHOD) - set(FREE)
    assert rest == {"data", "labels", "preset", "init", "seed", "window", "substitutes", "run"}
    assert set(defaults()) == set(METHOD) | set(FREE)


def test_what_no_preset_sets_is_named_for_help():
    set_ = {name for preset in PRESETS.values() for name in preset(IMAGENET)}

    assert set(UNSET) == {*METHOD, *FREE} - set_


def test_a_preset_is_what_is_run_and_free_settings_stand_beside_it(make_shards, tmp_path):
    data = make_shards().path
    config = settled(asked(data, preset="semmae-b8-foreground", epochs=3, seed=7), run(tmp_path / "new"), cuda=False)

    assert (config.patch, config.keep_share, config.embed_dim, config.masking) == (8, 0.25, 768, "semmae")
    assert (config.epochs, config.seed, config.batch_size) == (3, 7, 4096)
    assert config.preset == "semmae-b8-foreground"


@pytest.mark.parametrize(("field", "value"), [("masking", "random"), ("patch", 16), ("embed_dim", 64), ("flip", False)])
def test_another_value_of_what_a_preset_fixes_is_refused(field, value, make_shards, tmp_path):
    flag = "--" + field.replace("_", "-")
    with pytest.raises(ValueError, match=f"fixes {flag} .* and {flag} {value} was asked"):
        settled(
            asked(make_shards().path, preset="semmae-b8-foreground") | {field: value}, run(tmp_path / "x"), cuda=False
        )


def test_the_same_value_beside_a_preset_is_fine(make_shards, tmp_path):
    config = settled(asked(make_shards().path, preset="mae-b16", masking="random"), run(tmp_path / "x"), cuda=False)

    assert config.masking == "random"


@pytest.mark.parametrize(
    ("images", "cuda", "name"),
    [
        (40, False, "tiny"),
        (LARGE, False, "tiny"),
        (40, True, "small"),
        (LARGE - 1, True, "small"),
        (LARGE, True, "semmae-b16"),
    ],
)
def test_without_a_preset_the_model_follows_from_the_set_and_the_machine(images, cuda, name):
    assert fitting(SetShape(images, 224, 28), cuda=cuda) == name


@pytest.mark.parametrize(
    ("size", "grid", "patch"),
    [
        (224, 28, 16),
        (64, 16, 8),
        (96, 12, 8),
        (224, 14, 16),
        (32, 4, 8),
        (256, 8, 32),
        (512, 64, 16),
        (98, 28, 7),
        (224, 25, 16),
        (80, 7, 10),
        (10, 3, 2),
    ],
)
def test_the_patch_follows_from_the_images_and_their_label_grid(size, grid, patch):
    assert patch_of(SetShape(40, size, grid)) == patch


@pytest.mark.parametrize("images", [1, 40, 1_000, 30_000, 1_281_167])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_set_of_any_size_is_seen_often_enough_to_learn(name, images):
    chosen = PRESETS[name](SetShape(images, 224, 28))

    assert chosen["epochs"] >= 1
    assert chosen["epochs"] * images / chosen["batch_size"] > 300
    assert chosen["warmup_epochs"] == chosen["epochs"] / 20


def test_fewer_epochs_keep_the_share_of_warmup(make_shards, tmp_path):
    data = make_shards().path

    fewer = settled(asked(data, preset="semmae-b16", epochs=200), run(tmp_path / "x"), cuda=False)
    none = settled(asked(data, preset="semmae-b16", epochs=0), run(tmp_path / "x"), cuda=False)
    told = settled(asked(data, preset="semmae-b16", epochs=200, warmup_epochs=5.0), run(tmp_path / "x"), cuda=False)

    assert [one.warmup_epochs for one in (fewer, none, told)] == [10.0, 0.0, 5.0]


@pytest.mark.parametrize(
    ("field", "value"), [("mask_ratio", 1.5), ("keep_share", 0.0), ("depth", 0), ("gamma", -1.0), ("window", -1)]
)
def test_a_setting_out_of_range_is_refused_before_the_set_is_opened(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"{field} must"):
        settled(asked(tmp_path / "nowhere") | {field: value}, run(tmp_path / "x"), cuda=False)


def test_a_folder_where_nothing_was_computed_decides_nothing(make_shards, tmp_path):
    """A run that was refused, or ran out of memory at its start, leaves a config.json."""
    data, out = make_shards(size=64, grid=16).path, tmp_path / "run"
    RunFolder.open(settled(asked(data), run(out), cuda=False)).close()
    (out / ".config.json.0123456789abcdef0123456789abcdef").touch()  # rank 0 at work, seen by rank 1

    config = settled(asked(data, preset="semmae-b8-foreground"), run(out), cuda=False)

    assert (config.embed_dim, config.keep_share, config.epochs) == (768, 0.25, 800)
    with pytest.raises(ValueError, match="--preset tiny fixes --depth 6"):
        settled(asked(data, preset="tiny", depth=2), run(out), cuda=False)


def test_what_was_chosen_is_said_once_and_kept_by_the_folder(make_shards, tmp_path, capsys):
    data, out = make_shards(count=40, size=64, grid=16).path, tmp_path / "run"
    first = settled(asked(data, epochs=1, batch_size=8), run(out), cuda=False)
    said = capsys.readouterr().err
    pretrain(first, stop_after_steps=1)

    again = settled(asked(data), run(out), cuda=True)

    assert said.startswith("40 images of 64 px and no GPU: the model of --preset tiny (6 blocks, 192 wide, patch 8)")
    assert said.count("\n") == 1
    assert asdict(again) == asdict(first)
    assert capsys.readouterr().err.count("images of") == 0
    assert json.loads((out / "config.json").read_text())["embed_dim"] == 192
    with pytest.raises(ValueError, match="depth was 6, now 2"):
        RunFolder.open(settled(asked(data, depth=2), run(out), cuda=False))


def test_a_set_that_no_patch_divides_is_a_sentence():
    with pytest.raises(ValueError, match=r"no patch cuts images of 97 px .* extract with another --size"):
        patch_of(SetShape(10, 97, 12))


def test_a_warmup_of_half_a_run_is_told(make_shards, tmp_path, capfd):
    config = settled(
        asked(make_shards().path, epochs=2, warmup_epochs=1.0, batch_size=8, depth=1), run(tmp_path / "x"), cuda=False
    )

    pretrain(config, stop_after_steps=1)

    assert "the learning rate rises for 5 of 10 steps; lower --warmup-epochs" in capfd.readouterr().err
