"""Checkpoints: which are kept, and that none is used whose bytes are not those that were written."""

from pathlib import Path

import pytest
import torch

from training import checkpoint
from training.checkpoint import CheckpointError
from training.damage import DIGESTS, MODEL, STATE


def save(run: Path, step: int, *, keep: int = 2, stays: bool = False) -> Path:
    tensors = {"weight": torch.full((64,), float(step))}
    return checkpoint.save(run, step, tensors, metadata={"vit": {}}, state={"seed": step}, keep=keep, stays=stays)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip(file: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def empty(file: Path) -> None:
    """As a disk does that was full, or lost power before it wrote: the size is there, and no bytes."""
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("file", [MODEL, STATE, DIGESTS])
@pytest.mark.parametrize("spoil", [flip, cut, empty, Path.unlink])
def test_a_torn_checkpoint_is_told_and_the_one_before_is_used(file, spoil, tmp_path, capfd):
    save(tmp_path, 1)
    spoil(save(tmp_path, 2) / file)

    used = checkpoint.newest(tmp_path)

    if (file, spoil) == (DIGESTS, Path.unlink):  # as an earlier release left it
        assert used == tmp_path / "checkpoints/step-00000002"
        return
    assert used == tmp_path / "checkpoints/step-00000001"
    said = capfd.readouterr().err
    assert f"{tmp_path}/checkpoints/step-00000002 is torn (" in said
    assert "step-00000001, the one before, is used" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("file", "spoil"), [(MODEL, cut), (STATE, cut), (STATE, flip), (STATE, empty)])
def test_without_digests_the_formats_show_what_they_can(file, spoil, tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / DIGESTS).unlink()
    spoil(tmp_path / "checkpoints/step-00000002" / file)

    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-00000001"


def test_a_run_whose_checkpoints_are_all_torn_does_not_begin_again_silently(tmp_path):
    for step in (1, 2):
        cut(save(tmp_path, step) / STATE)

    with pytest.raises(CheckpointError, match=r"step-00000002 is torn .*step-00000001 is torn .*begin it again"):
        checkpoint.newest(tmp_path)


def test_an_evaluation_reads_no_torn_model(tmp_path, capfd):
    whole, torn = save(tmp_path, 1), save(tmp_path, 2)
    flip(torn / MODEL)
    flip(whole / STATE)  # which it does not read

    assert checkpoint.find(tmp_path) == whole / MODEL
    assert "step-00000002 is torn" in capfd.readouterr().err
    for named in (torn, torn / MODEL):
        with pytest.raises(CheckpointError, match=r"step-00000002 is torn .*take another checkpoint"):
            checkpoint.find(named)


def test_a_torn_checkpoint_is_written_again_when_its_step_is_reached(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / MODEL)

    again = save(tmp_path, 2)

    assert checkpoint.newest(tmp_path) == again
    assert checkpoint.load_tensors(again / MODEL)[0]["weight"].tolist() == [2.0] * 64


def test_a_torn_newer_one_does_not_count_as_one_of_the_last_two(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    cut(save(tmp_path, 9) / MODEL)

    save(tmp_path, 3)

    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000009"]


@pytest.mark.parametrize(("keep", "kept"), [(1, (2, 4, 7)), (2, (2, 4, 6, 7)), (3, (2, 4, 5, 6, 7))])
def test_the_newest_are_kept_and_those_that_stay(keep, kept, tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=keep, stays=step in (2, 4, 7))

    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]
