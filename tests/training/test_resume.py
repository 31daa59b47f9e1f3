"""A run goes on from its newest whole checkpoint, wherever it was killed; its ranks agree on which."""

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from toy import STEPS, Toy, config_of, on_two_ranks, run

from training import checkpoint
from training.loop import train
from training.run_folder import opened


def test_a_torn_checkpoint_costs_its_steps_and_nothing_else(tmp_path, capfd):
    run(tmp_path, Toy(), stop=5)
    run(tmp_path, Toy(), stop=9)
    torn = checkpoint.newest(tmp_path) / "state.pt"
    torn.write_bytes(torn.read_bytes()[:-100])

    task = Toy()
    report = run(tmp_path, task)

    said = capfd.readouterr().err
    assert "step-00000009 is torn (state.pt is not what was written" in said
    assert "goes on after 5 of 30 steps" in said
    assert task.accepted == list(range(5, STEPS))
    assert report == run(tmp_path / "straight", Toy())


def killed_in_its_second_checkpoint(out: Path) -> None:
    """In a process of its own: the state is half written when it dies."""
    whole, saved = torch.save, []

    def half(state: dict, path: Path) -> None:
        whole(state, path)
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(path.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    with opened(config_of(out)) as folder:
        train(Toy(), folder, dataclasses.replace(config_of(out).run, checkpoint_minutes=0), total=STEPS)


def test_a_kill_in_the_middle_of_a_checkpoint_resumes_to_the_same_weights(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_in_its_second_checkpoint, args=(tmp_path,))
    process.start()
    process.join(timeout=60)

    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoints/.step-00000002.partial/state.pt").stat().st_size == 100
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-00000001"
    assert run(tmp_path, Toy()) == run(tmp_path / "straight", Toy())
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_checkpoints_that_stay_are_written_at_their_step_and_shown(tmp_path):
    tasks = [Toy(stays=(4, 20, STEPS)), Toy(stays=(4, 20, STEPS))]
    run(tmp_path, tasks[0], stop=20)
    run(tmp_path, tasks[1])

    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (4, 20, STEPS)]
    assert [task.shown_at for task in tasks] == [[4, 20], [STEPS]]


class Drawn(Toy):
    """Writes a picture where it is shown."""

    def __init__(self, pictures: Path):
        super().__init__(stays=(4, 20, STEPS))
        self.pictures = pictures

    def show(self, step: int) -> None:
        self.pictures.mkdir(exist_ok=True)
        (self.pictures / f"step-{step:08d}").touch()


def killed_once_its_checkpoint_is_kept(out: Path, step: int) -> None:
    """In a process of its own, which dies as soon as that checkpoint is in its place."""
    replace = os.replace

    def last(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == f"step-{step:08d}":
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = last
    run(out, Drawn(out / "pictures"))


@pytest.mark.parametrize("step", [4, STEPS])
def test_a_kill_after_a_kept_checkpoint_loses_no_picture(step, tmp_path):
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=killed_once_its_checkpoint_is_kept, args=(tmp_path, step))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.newest(tmp_path) == tmp_path / f"checkpoints/step-{step:08d}"

    run(tmp_path, Drawn(tmp_path / "pictures"))

    kept, drawn = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("checkpoints", "pictures"))
    assert kept == drawn == [f"step-{step:08d}" for step in (4, 20, STEPS)]


@pytest.mark.parametrize("steps", [0, 3])
def test_ranks_of_which_one_finds_no_checkpoint_are_refused(steps, tmp_path, capfd):
    """A checkpoint of no steps is one."""
    run(tmp_path / "two" / "main", Toy(), stop=steps)

    assert on_two_ranks(tmp_path / "two", outs=("main", "elsewhere")) == [1, 1]

    assert capfd.readouterr().err.count("the ranks see different checkpoints") == 2
