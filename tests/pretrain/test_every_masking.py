"""What a run keeps to under every masking: resume, ranks, micro-batches, and the losses that a change may not move."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import assert_near, write_set
from watch import watching

from pretrain.config import PretrainConfig, StreamRun
from pretrain.masking.strategies import STRATEGIES
from pretrain.objective import LEARNED, Objective
from pretrain.replay import replay
from pretrain.train import Pretraining, opened_shards, pretrain
from training import checkpoint
from training.metrics import read_metrics
from training.nonfinite import set_aside
from training.run_folder import opened
from training.saving import take_back

MASKINGS = sorted({*STRATEGIES, *LEARNED})
TINY = {
    "patch": 8, "embed_dim": 32, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
    "epochs": 2, "warmup_epochs": 0, "batch_size": 16, "base_lr": 7.5e-3,
}  # fmt: skip
STEPS = 3
FIRST_LOSSES = Path(__file__).with_name("first_losses.json")
"""Of 20 steps at seed 0. A change that moves one by 1e-4 of itself says in its commit why, and writes all again:
`python tests/pretrain/test_every_masking.py`."""


def config(data: Path, out: Path, masking: str, *, micro_batch: int | None = None, **changes) -> PretrainConfig:
    run = StreamRun(out=out, device="cpu", precision="fp32", micro_batch=micro_batch)
    return PretrainConfig(data=str(data), masking=masking, run=run, **TINY | changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(checkpoint.find(run))[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "shards", heads=3)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run of each masking that nothing interrupts; made once."""
    made = {}

    def run(masking: str) -> Path:
        if masking not in made:
            made[masking] = tmp_path_factory.mktemp("straight") / masking
            pretrain(config(data, made[masking], masking), stop_after_steps=STEPS)
        return made[masking]

    return run


def killed_while_writing(newest: Path) -> None:
    """What a kill in the write of the next checkpoint leaves (tests/training/test_resume.py kills one there)."""
    aside = newest.with_name(".step-00000003.partial")
    aside.mkdir()
    for file in newest.iterdir():
        (aside / file.name).write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("masking", MASKINGS)
def test_stopped_mid_epoch_killed_in_a_write_and_resumed_it_gives_the_same_bits(masking, data, straight, tmp_path):
    for stop in (1, 2):
        pretrain(config(data, tmp_path, masking), stop_after_steps=stop)
    killed_while_writing(tmp_path / "checkpoints/step-00000002")
    pretrain(config(data, tmp_path, masking), stop_after_steps=STEPS)

    one, other = weights(straight(masking)), weights(tmp_path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    logged = [[line["loss"] for line in read_metrics(run)] for run in (straight(masking), tmp_path)]
    assert logged[0] == logged[1]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("masking", ["semmae", *sorted(LEARNED)])
def test_a_step_that_is_written_aside_is_computed_again_as_it_was(masking, data, tmp_path):
    """What a masking updates ahead of the step is in what is written, and is not updated again."""
    settings = config(data, tmp_path, masking)
    pretrain(settings, stop_after_steps=2)
    with opened(settings) as run, opened_shards(settings) as shards:
        task = Pretraining(settings, shards)
        take_back(task, checkpoint.newest(tmp_path))
        task.open(2)
        with closing(task):
            task.read(2)
            loss = sum(task.losses(2))
            aside = set_aside(task, run, 2, loss, skipped=0)

    assert replay(aside)[0] == loss.item()


@pytest.mark.parametrize("masking", ["semmae", *sorted(LEARNED)])
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches_change_nothing_but_rounding(micro_batch, masking, data, straight, tmp_path):
    pretrain(config(data, tmp_path, masking, micro_batch=micro_batch), stop_after_steps=STEPS)

    assert_near(weights(straight(masking)), weights(tmp_path))
    losses = [[line["loss"] for line in read_metrics(run)] for run in (straight(masking), tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_two_ranks_of_four_micro_batches_equal_one_with_every_masking(data, straight, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import torch.distributed\nfrom pathlib import Path\nfrom pretrain.config import PretrainConfig, StreamRun\n"
        "from pretrain.train import pretrain\n"
        "torch.distributed.init_process_group('gloo')  # once: a group that was left cannot be joined again\n"
        f"for masking in {MASKINGS!r}:\n"
        f"    out = Path({str(tmp_path)!r}) / masking\n"
        "    run = StreamRun(out=out, device='cpu', precision='fp32', micro_batch=2)\n"
        f"    config = PretrainConfig(data={str(data)!r}, masking=masking, run=run, **{TINY!r})\n"
        f"    pretrain(config, stop_after_steps={STEPS})\n"
    )

    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    for masking in MASKINGS:
        one, two = weights(straight(masking)), weights(tmp_path / masking)
        assert_near(one, two)
        assert not torch.equal(one["mask_token"], torch.zeros_like(one["mask_token"]))


def first_losses(masking: str, data: Path, out: Path) -> list[float]:
    with watching(Objective) as watched:
        pretrain(config(data, out, masking, epochs=8))
    return [loss.item() for loss in watched.outputs]


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_first_losses_are_those_that_were_written_down(masking, data, tmp_path):
    written = json.loads(FIRST_LOSSES.read_text())
    assert masking in written, (
        f"write down the first losses of {masking}: `python tests/pretrain/test_every_masking.py`"
    )

    assert first_losses(masking, data, tmp_path) == pytest.approx(written[masking], rel=1e-4)


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_set(Path(folder) / "shards", heads=3)
        losses = {name: first_losses(name, shards, Path(folder) / name) for name in MASKINGS}
    lines = (f'  "{name}": {[round(value, 6) for value in values]}' for name, values in losses.items())
    FIRST_LOSSES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
