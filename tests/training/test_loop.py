"""The one loop: what it skips, when it ends, what it leaves, on one rank and on two."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from training import checkpoint, distributed
from training.config import RunConfig
from training.damage import MODEL
from training.loop import MOST_SKIPPED, TERMINATED, train
from training.metrics import read_metrics
from training.nonfinite import again
from training.run_folder import opened
from training.saving import save
from training.task import Task
from training.update import update

STEPS = 30


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    run: RunConfig
    batch_size: int = 2


class Toy(Task):
    """One weight is drawn to 1, from every rank; `spoil(step)` is added to this rank's loss."""

    name, batch_size = "toy", 2

    def __init__(self, spoil: Callable[[int], float] = lambda step: 0.0, *, stays: tuple[int, ...] = ()):
        self.kept, self.shown_at = stays, []
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.0, weight_decay=0.0)
        self.spoil, self.accepted, self.open_files = spoil, [], 0

    def rate(self, step: int) -> float:
        return 0.1 / (1 + step)

    def losses(self, step: int) -> Iterator[Tensor]:
        yield (self.weight - 1).square().sum() * (1 + self.spoil(step))
        distributed.average_gradients([self.weight])

    def accept(self, step: int) -> None:
        self.accepted.append(step)

    def samples(self) -> dict:
        return {"indices": [distributed.rank()]}

    def stays(self, step: int) -> bool:
        return step in self.kept

    def show(self, step: int) -> None:
        self.shown_at.append(step)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight.data}

    def metadata(self) -> dict:
        return {}

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        self.weight.data.copy_(tensors["weight"])

    def open(self, step: int) -> None:
        self.open_files += 1

    def close(self) -> None:
        self.open_files -= 1

    def report(self, step: int) -> dict:
        return {"weight": self.weight.item()}


def config_of(out: Path) -> ToyConfig:
    return ToyConfig(RunConfig(out=out, device="cpu", checkpoint_minutes=1e9))


def run(out: Path, task: Toy, stop: int | None = None) -> dict:
    config = config_of(out)
    with opened(config) as folder:
        return train(task, folder, config.run, total=STEPS, stop_after_steps=stop)


def not_a_number_at(*steps: int) -> Callable[[int], float]:
    return lambda step: math.nan if step in steps else 0.0


def test_a_gradient_that_is_not_finite_skips_its_step_and_nothing_else(tmp_path, capfd):
    task = Toy(not_a_number_at(3, 7))

    report = run(tmp_path, task)

    by_hand = Toy()
    for step in sorted(set(range(STEPS)) - {3, 7}):
        update(by_hand.optimizer, by_hand.losses(step), rate=by_hand.rate(step))
    assert report["weight"] == by_hand.weight.item()
    assert task.accepted == [step for step in range(STEPS) if step not in (3, 7)]
    assert (report["skipped"], report["steps"]) == (2, STEPS)
    assert "the gradient of step 3 is not finite; the step is skipped" in capfd.readouterr().err
    lines = read_metrics(tmp_path)
    assert "loss" not in lines[3]
    assert [line["skipped"] for line in lines[2:5]] == [0, 1, 1]
    assert json.loads((tmp_path / "DONE.json").read_text()) == report


def test_what_a_skipped_step_saw_is_written_aside_and_computed_again(tmp_path, capfd):
    run(tmp_path, Toy(not_a_number_at(2, 4, 6, 8)))

    asides = sorted((tmp_path / "nonfinite").iterdir())
    assert [one.name for one in asides] == [f"step-{step:08d}" for step in (2, 4, 6)]  # and no more
    assert f"step 2 is not finite; the step is skipped; what it saw is kept in {asides[0]}" in capfd.readouterr().err
    straight = Toy(not_a_number_at(2))
    run(tmp_path / "straight", straight, stop=4)
    tensors, state = checkpoint.load_tensors(asides[1] / MODEL)[0], checkpoint.load_state(asides[1])
    assert torch.equal(tensors["weight"], straight.weight.data)
    assert (state["step"], state["skipped"]) == (4, 1)
    assert json.loads((asides[1] / "samples.json").read_text()) == {
        "step": 4, "ranks": [{"rank": 0, "loss": "nan", "indices": [0]}]
    }  # fmt: skip
    spoilt, mended = again(Toy(not_a_number_at(4)), asides[1]), again(Toy(), asides[1])
    assert all(map(math.isnan, spoilt))
    assert mended[0] == pytest.approx((straight.weight.item() - 1) ** 2)
    assert math.isfinite(mended[1])


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


class Slow(Toy):
    """Waits for a batch three times as long as it computes, and measures something in two steps."""

    log_every = 5

    def read(self, step: int) -> None:
        time.sleep(0.03)

    def losses(self, step: int) -> Iterator[Tensor]:
        time.sleep(0.01)
        yield from super().losses(step)

    def measures(self, step: int) -> bool:
        return step in (2, 7)


def test_the_share_of_time_waiting_for_data_is_logged_and_no_step_that_measures_is_left_out(tmp_path):
    report = run(tmp_path, Slow(), stop=12)

    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 2, 5, 7, 10]
    assert all(0.4 < line["waiting"] < 0.8 for line in lines)
    assert all(line["images_per_second"] < 60 for line in lines)
    assert "waiting" not in report


def test_the_progress_line_says_images_a_second_beside_the_share_of_waiting(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("training.progress.LOG_S", -10)  # a line a step

    run(tmp_path, Slow(), stop=3)

    lines, logged = capfd.readouterr().err.splitlines(), read_metrics(tmp_path)
    for line, now in zip(lines[:3], [logged[0], logged[0], logged[1]], strict=True):
        assert f"  images/s {now['images_per_second']:.4g}  waiting {now['waiting']:.4g}" in line


def test_too_many_in_a_row_end_the_run_with_its_last_checkpoint_whole(tmp_path):
    run(tmp_path, Toy(), stop=5)
    task = Toy(lambda step: math.inf)

    with pytest.raises(FloatingPointError, match=rf"gradients of {MOST_SKIPPED} steps in a row .* lower --base-lr"):
        run(tmp_path, task)

    assert task.open_files == 0
    assert not (tmp_path / "DONE.json").exists()
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-00000005"


def test_many_skipped_steps_end_no_run_while_others_are_taken_between_them(tmp_path):
    every_other = range(0, STEPS, 2)
    assert len(every_other) > MOST_SKIPPED

    assert run(tmp_path, Toy(not_a_number_at(*every_other)))["skipped"] == len(every_other)


def test_skipped_steps_are_counted_over_a_stop(tmp_path):
    run(tmp_path, Toy(not_a_number_at(1)), stop=4)

    assert run(tmp_path, Toy(not_a_number_at(20)))["skipped"] == 2


def test_gradients_are_scaled_down_to_the_largest_norm_and_no_lower_one_is_touched():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    _, norm = update(optimizer, [(weight**2).sum() / 2], rate=1.0, largest_norm=1.0)

    assert norm == pytest.approx(5.0)
    assert torch.allclose(weight.data, torch.tensor([2.4, 3.2]), atol=1e-5)
    assert optimizer.param_groups[0]["lr"] == 1.0
    update(optimizer, [(weight**2).sum() / 2], rate=0.5, largest_norm=10.0)
    assert torch.allclose(weight.data, torch.tensor([1.2, 1.6]), atol=1e-5)


def test_the_loop_scales_gradients_down_to_the_largest_norm_of_its_task(tmp_path):
    task = Toy()
    task.optimizer, task.largest_norm = torch.optim.SGD([task.weight], lr=0.0), 0.5

    report = run(tmp_path, task, stop=1)

    assert report["weight"] == pytest.approx(0.1 * 0.5)  # the rate of step 0, times a gradient of 2 cut to 0.5
    assert report["grad_norm"] == pytest.approx(2.0)


def signal_at(step: int, number: signal.Signals) -> Callable[[int], float]:
    def spoil(now: int) -> float:
        if now == step:
            os.kill(os.getpid(), number)
        return 0.0

    return spoil


def sigterm_at(step: int) -> Callable[[int], float]:
    return signal_at(step, signal.SIGTERM)


def test_sigterm_saves_and_exits_without_done(tmp_path, capfd):
    before, task = signal.getsignal(signal.SIGTERM), Toy(sigterm_at(6))

    with pytest.raises(SystemExit) as ended:
        run(tmp_path, task)

    assert ended.value.code == TERMINATED == 143
    assert "told to stop after 7 of 30 steps, which are kept" in capfd.readouterr().err
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-00000007"
    assert not (tmp_path / "DONE.json").exists()
    assert task.open_files == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert run(tmp_path, Toy())["weight"] == run(tmp_path / "straight", Toy())["weight"]


def test_ctrl_c_keeps_the_steps_that_are_done(tmp_path, capfd):
    before, task = signal.getsignal(signal.SIGINT), Toy(signal_at(6, signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, task)

    assert "told to stop after 7 of 30 steps, which are kept" in capfd.readouterr().err
    assert task.accepted[-1] == 6
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-00000007"
    assert signal.getsignal(signal.SIGINT) is before
    run(tmp_path, Toy())
    assert "goes on after 7 of 30 steps" in capfd.readouterr().err


def test_a_second_ctrl_c_waits_for_nothing(tmp_path):
    def twice(step: int) -> float:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    task = Toy(twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, task)

    assert task.accepted[-1] == 5
    assert checkpoint.newest(tmp_path) is None
    assert task.open_files == 0


def test_a_finished_run_is_said_to_be_one(tmp_path, capfd):
    run(tmp_path, Toy())
    assert "finished already" not in capfd.readouterr().err

    with opened(config_of(tmp_path)) as folder:
        assert folder.finished

    assert f"{tmp_path} is finished already" in capfd.readouterr().err


def test_sigterm_in_the_last_step_finishes_the_run_and_ends_the_process(tmp_path):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, Toy(sigterm_at(STEPS - 1)))

    assert ended.value.code == TERMINATED
    assert json.loads((tmp_path / "DONE.json").read_text())["steps"] == STEPS


def test_a_weight_beside_the_model_that_is_not_finite_is_not_saved(tmp_path):
    run(tmp_path, Toy(), stop=5)
    task = Toy()
    head = torch.nn.Parameter(torch.zeros(1))
    task.optimizer.add_param_group({"params": [head]})
    head.data.fill_(torch.inf)

    with opened(config_of(tmp_path / "other")) as folder, pytest.raises(FloatingPointError, match="no longer finite"):
        save(task, folder, 6)

    assert checkpoint.newest(tmp_path / "other") is None


def on_two_ranks(
    folder: Path, spoil: Callable[[int], float] = lambda step: 0.0, outs: tuple[str, str] = ("run", "run")
) -> list[int | None]:
    """Exit codes of two processes that train the toy together, each in its folder; `spoil` is the second one's."""

    def process(rank: int) -> None:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        task = Toy(spoil if rank else lambda step: 0.0)
        report = run(folder / outs[rank], task)
        (folder / f"{rank}.json").write_text(json.dumps(report))

    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(timeout=60)
    return [one.exitcode for one in processes]


def test_one_ranks_bad_gradient_skips_the_step_on_both(tmp_path):
    assert on_two_ranks(tmp_path / "two", not_a_number_at(4)) == [0, 0]

    reports = [json.loads((tmp_path / f"two/{rank}.json").read_text()) for rank in range(2)]
    alone = run(tmp_path / "one", Toy(not_a_number_at(4)))
    assert [report["skipped"] for report in reports] == [1, 1]
    assert reports[0]["weight"] == reports[1]["weight"] == alone["weight"]
    told = json.loads((tmp_path / "two/run/nonfinite/step-00000004/samples.json").read_text())
    assert [(one["rank"], one["indices"], one["loss"] == "nan") for one in told["ranks"]] == [
        (0, [0], False), (1, [1], True)
    ]  # fmt: skip


def test_sigterm_to_one_rank_ends_both(tmp_path):
    assert on_two_ranks(tmp_path / "two", sigterm_at(6)) == [TERMINATED, TERMINATED]

    assert checkpoint.newest(tmp_path / "two/run") == tmp_path / "two/run/checkpoints/step-00000007"
    assert not (tmp_path / "two/run/DONE.json").exists()


@pytest.mark.parametrize("steps", [0, 3])
def test_ranks_of_which_one_finds_no_checkpoint_are_refused(steps, tmp_path, capfd):
    """A checkpoint of no steps is one."""
    run(tmp_path / "two" / "main", Toy(), stop=steps)

    assert on_two_ranks(tmp_path / "two", outs=("main", "elsewhere")) == [1, 1]

    assert capfd.readouterr().err.count("the ranks see different checkpoints") == 2
