"""The one loop: what it skips, when it ends, what it leaves, on one rank and on two."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from toy import STEPS, Toy, config_of, not_a_number_at, on_two_ranks, run

from training import checkpoint
from training.damage import MODEL
from training.loop import MOST_SKIPPED, TERMINATED
from training.metrics import read_metrics
from training.nonfinite import again
from training.run_folder import opened
from training.saving import save
from training.update import update


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
