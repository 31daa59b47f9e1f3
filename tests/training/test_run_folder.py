"""Run folders, checkpoints, metrics and schedules keep their promises."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import checkpoint
from training.checkpoint import CheckpointError
from training.config import RunConfig
from training.device import pick_device
from training.metrics import Metrics, read_metrics
from training.progress import Progress, duration
from training.run_folder import RunError, RunFolder
from training.schedule import learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    lr: float = 0.1
    images: str = ""
    run: RunConfig


def toy(out: Path, **changes) -> Toy:
    return Toy(run=RunConfig(out=out), **changes)


def save(run: Path, step: int) -> Path:
    return checkpoint.save(
        run, step, {"weight": torch.full((2,), float(step))}, metadata={"vit": {"embed_dim": 2}}, state={"seed": 1}
    )


def logged(run: Path) -> None:
    """A run in which one step was made."""
    metrics = Metrics(run, step=0)
    metrics.log(0, loss=1.0)
    metrics.close()


def test_a_run_folder_holds_its_config_and_is_finished_by_done(tmp_path):
    with RunFolder.open(toy(tmp_path / "run")) as run:
        assert not run.finished
        run.finish({"loss": 0.5})

    assert json.loads((tmp_path / "run/config.json").read_text())["lr"] == 0.1
    assert (
        json.loads((tmp_path / "run/environment.json").read_text())["versions"]["torch"]
        == torch.__version__.split("+")[0]
    )
    with RunFolder.open(toy(tmp_path / "run")) as run:
        assert run.finished
        assert run.report() == {"loss": 0.5}


def test_another_config_is_refused_and_the_difference_named(tmp_path):
    RunFolder.open(toy(tmp_path)).close()
    logged(tmp_path)

    with pytest.raises(ValueError, match=r"lr was 0\.1, now 0\.2"):
        RunFolder.open(toy(tmp_path, lr=0.2))


def test_a_folder_in_which_nothing_was_computed_takes_another_config(tmp_path):
    """A run refused for a wrong path must not keep its folder from the right one."""
    RunFolder.open(toy(tmp_path)).close()
    RunFolder.open(toy(tmp_path, lr=0.2)).close()

    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.2


def test_a_run_that_ended_in_its_first_step_leaves_its_folder_to_another_config(tmp_path):
    """Out of memory, say: the log is open, a checkpoint was begun, and nothing was computed."""
    RunFolder.open(toy(tmp_path)).close()
    Metrics(tmp_path, step=0).close()
    (tmp_path / "checkpoints/.step-00000001.partial").mkdir(parents=True)

    RunFolder.open(toy(tmp_path, lr=0.2)).close()

    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.2


@pytest.mark.parametrize("done", [logged, lambda run: save(run, 1)])
def test_a_step_or_a_checkpoint_binds_a_folder_to_its_config(tmp_path, done):
    RunFolder.open(toy(tmp_path)).close()
    done(tmp_path)

    with pytest.raises(ValueError, match=r"lr was 0\.1, now 0\.2"):
        RunFolder.open(toy(tmp_path, lr=0.2))


def test_a_finished_run_that_may_only_be_read_is_reused_and_another_config_refused(public, another_account):
    with RunFolder.open(toy(public / "run")) as run:
        run.finish({"loss": 0.5})
    (public / "run").chmod(0o555)

    with another_account(), RunFolder.open(toy(public / "run")) as run:
        assert run.finished
        assert run.report() == {"loss": 0.5}
    with another_account(), pytest.raises(ValueError, match=r"lr was 0\.1, now 0\.2"):
        RunFolder.open(toy(public / "run", lr=0.2))


def test_a_folder_that_may_not_be_written_is_one_sentence(public, another_account):
    public.chmod(0o555)

    with (
        another_account(),
        pytest.raises(ValueError, match=r"run cannot be written .*Permission denied.*choose another"),
    ):
        RunFolder.open(toy(public / "run"))
    assert list(public.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_what_a_run_writes_follows_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with RunFolder.open(toy(tmp_path / "run")) as run:
            logged(run.path)
            save(run.path, 1)
            run.finish({})
    finally:
        os.umask(before)

    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"model.safetensors", "state.pt", ".lock", "config.json", "DONE.json", "metrics.jsonl"} <= modes.keys()
    assert {name: oct(one) for name, one in modes.items() if one != mode} == {}


def test_a_checkpoint_that_may_not_be_read_is_not_called_missing(public, another_account):
    file = save(public, 1) / "model.safetensors"
    file.chmod(0o600)

    with another_account(), pytest.raises(PermissionError):
        checkpoint.load_tensors(file)


def test_a_config_of_something_else_is_no_run_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')

    with pytest.raises(ValueError, match="belongs to another run"):
        RunFolder.open(toy(tmp_path))
    assert "model_type" in (tmp_path / "config.json").read_text()


def test_a_slash_after_a_folder_is_no_other_setting(tmp_path):
    RunFolder.open(toy(tmp_path, images="photos/")).close()
    logged(tmp_path)

    RunFolder.open(toy(tmp_path, images="photos")).close()


def test_a_setting_younger_than_the_run_counts_as_its_default(tmp_path):
    RunFolder.open(toy(tmp_path)).close()
    logged(tmp_path)
    older = json.loads((tmp_path / "config.json").read_text())
    del older["lr"]
    (tmp_path / "config.json").write_text(json.dumps(older))

    RunFolder.open(toy(tmp_path)).close()
    with pytest.raises(ValueError, match=r"lr was 0\.1, now 0\.2"):
        RunFolder.open(toy(tmp_path, lr=0.2))


def finished(path: Path, *, checkpoints: bool = True) -> None:
    with RunFolder.open(toy(path)) as run:
        logged(path)
        if checkpoints:
            save(path, 1)
        run.finish({})


def test_a_finished_run_goes_on_where_a_raisable_setting_is_raised(tmp_path):
    finished(tmp_path)

    with RunFolder.open(toy(tmp_path, lr=0.2), raisable=("lr",)) as run:
        assert not run.finished
        assert run.before["lr"] == 0.1
        assert (tmp_path / "DONE.json").is_file()  # what is refused from here on leaves all as it was
        run.begin()

    assert not (tmp_path / "DONE.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.2
    with RunFolder.open(toy(tmp_path, lr=0.2), raisable=("lr",)) as run:
        assert run.before is None


def test_no_other_change_of_a_raisable_setting_is_let_in(tmp_path):
    finished(tmp_path / "done")
    finished(tmp_path / "deleted", checkpoints=False)
    RunFolder.open(toy(tmp_path / "half")).close()
    logged(tmp_path / "half")

    for name, changes, raisable in [
        ("done", {"lr": 0.05}, ("lr",)),  # lowered
        ("half", {"lr": 0.2}, ("lr",)),  # not finished
        ("deleted", {"lr": 0.2}, ("lr",)),  # where would it go on?
        ("done", {"lr": 0.2}, ()),
        ("done", {"lr": 0.2, "images": "others"}, ("lr",)),
    ]:
        with pytest.raises(ValueError, match="belongs to another run") as refused:
            RunFolder.open(toy(tmp_path / name, **changes), raisable=raisable)
        assert ("lr may only be raised, and only in a finished run" in str(refused.value)) == (
            "images" not in changes and bool(raisable)
        )


def test_what_only_changes_speed_may_change(tmp_path):
    RunFolder.open(toy(tmp_path)).close()

    RunFolder.open(Toy(run=dataclasses.replace(RunConfig(out=tmp_path), threads=7))).close()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(ValueError, match="neither empty nor a run folder"):
        RunFolder.open(toy(tmp_path))


def test_a_file_cannot_be_a_run_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"needs a folder, and .*file is a file"):
        RunFolder.open(toy(tmp_path / "file"))


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    with RunFolder.open(toy(tmp_path)), pytest.raises(RunError, match="in use by another process"):
        RunFolder.open(toy(tmp_path))


def test_checkpoints_come_back_and_old_ones_go(tmp_path):
    for step in (1, 2, 30):
        save(tmp_path, step)

    newest = checkpoint.newest(tmp_path)
    tensors, metadata = checkpoint.load_tensors(newest / "model.safetensors")
    assert newest.name == "step-00000030"
    assert tensors["weight"].tolist() == [30, 30]
    assert metadata["vit"] == {"embed_dim": 2}
    assert checkpoint.load_state(newest) == {"seed": 1, "step": 30}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_checkpoint_torn_by_a_kill_is_not_seen(tmp_path):
    save(tmp_path, 1)
    torn = tmp_path / "checkpoints/.step-00000002.partial"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")

    assert checkpoint.newest(tmp_path).name == "step-00000001"
    assert save(tmp_path, 2).name == "step-00000002"
    assert not torn.exists()


def test_a_folder_inside_a_run_is_told_to_be_one(tmp_path):
    save(tmp_path, 1)

    with pytest.raises(CheckpointError, match=f"inside a run; pass the run, {tmp_path}$"):
        checkpoint.find(tmp_path / "checkpoints")


def test_a_torn_file_is_a_sentence(tmp_path):
    path = save(tmp_path, 1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])

    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        checkpoint.load_tensors(path)


def test_metrics_after_a_resume_are_those_of_one_run(tmp_path):
    first = Metrics(tmp_path, step=0)
    for step in range(4):
        first.log(step, loss=step / 2)
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line

    second = Metrics(tmp_path, step=2)
    second.log(2, loss=9)
    second.close()

    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(0, 0), (1, 0.5), (2, 9)]


@given(step=st.integers(0, 200), warmup=st.integers(0, 50))
def test_the_learning_rate_rises_then_falls_to_its_end(step, warmup):
    rate = learning_rate(step, peak=1.0, warmup_steps=warmup, total_steps=100, final=0.1)

    if step < warmup:
        assert rate == step / warmup
    else:
        share = min(1, (step - warmup) / (100 - warmup))
        assert rate == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def test_a_device_the_machine_lacks_is_refused():
    lacking = "mps" if not torch.backends.mps.is_available() else "cuda"

    with pytest.raises(ValueError, match="this machine offers"):
        pick_device(lacking)


def test_progress_of_nothing_is_silent(capsys):
    progress = Progress(0, "parts", "steps")
    progress._began -= 10

    progress.close()

    assert capsys.readouterr().err == ""


def test_figures_of_a_thousand_and_more_are_said_in_whole_numbers(capsys):
    progress = Progress(9, "parts", "steps")
    progress._began, progress._printed = progress._began - 10, 0

    progress.advance(loss=0.123456, speed=16384.4)

    assert capsys.readouterr().err.endswith("left  loss 0.1235  speed 16,384\n")


def test_times_are_said_as_people_say_them():
    assert [duration(s) for s in (4.2, 190, 7500)] == ["4 s", "3 min 10 s", "2 h 05 min"]
