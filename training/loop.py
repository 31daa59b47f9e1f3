"""The one training loop: resume, step, log, save, finish. It never asks which task it runs."""

import math
import signal
import sys
from contextlib import ExitStack, closing

import torch

from training import checkpoint, distributed
from training.config import RunConfig
from training.metrics import Metrics, last_figures
from training.nonfinite import set_aside
from training.pace import Pace
from training.progress import Progress
from training.run_folder import RunFolder
from training.saving import resume, save
from training.signals import signals_noted
from training.task import Task
from training.update import update

MOST_SKIPPED = 10
"""Steps in a row that may be skipped, because a gradient is not finite, before the run ends."""
TERMINATED = 143
"""Exit status after SIGTERM: 128 and the number of the signal."""


def train(task: Task, run: RunFolder, config: RunConfig, *, total: int, stop_after_steps: int | None = None) -> dict:
    """Take the steps of `task` that are left and return its report; when they are `total`, the run is finished.

    A gradient that is not finite, on any rank, skips its step on all of them; the first such steps are written aside.
    SIGTERM, to any rank, ends the process after the step under way, with a checkpoint, no DONE.json, and exit status
    TERMINATED; where that step was the last one, the run is finished first. Ctrl-C does the same and raises
    KeyboardInterrupt; a second one waits for nothing.

    Args:
        stop_after_steps: End early, with a checkpoint, when so many are done in all, as a kill would.

    Raises:
        FloatingPointError: MOST_SKIPPED steps in a row were skipped, or a weight is not finite; the newest checkpoint
            is whole.
        RunError, CheckpointError: See `training.saving.resume`.
    """
    step, skipped = resume(task, run)
    run.begin()
    figures = last_figures(run.path, step=step)
    end = total if stop_after_steps is None else min(total, stop_after_steps)
    if step:
        _tell(f"{run.path} goes on after {step:,} of {total:,} steps")
    with ExitStack() as stack:
        signals = stack.enter_context(signals_noted())
        metrics = stack.enter_context(closing(Metrics(run.path, step=step)))
        progress = stack.enter_context(closing(Progress(total, task.name, "steps", done=step)))
        task.open(step)
        stack.callback(task.close)
        clock, pace, in_a_row, stop = checkpoint.Clock(config.checkpoint_minutes), Pace(), 0, False
        while step < end and not stop:
            with pace.waiting():
                task.read(step)
            rate = task.rate(step)
            loss, norm = update(task.optimizer, task.losses(step), rate=rate, largest_norm=task.largest_norm)
            pace.done(task.batch_size)
            if math.isfinite(norm):
                task.accept(step)
                in_a_row = 0
            else:
                aside = set_aside(task, run, step, loss, skipped=skipped)
                skipped, in_a_row = skipped + 1, in_a_row + 1
                _tell_skipped(step, in_a_row, f"; what it saw is kept in {aside}" if aside else "")
            if step % task.log_every == 0 or step == total - 1 or task.measures(step):
                speed, waiting = pace.figures()
                loss, waiting = distributed.mean_over_ranks(torch.stack([loss, loss.new_tensor(waiting)])).tolist()
                shown = {"loss": loss, "lr": rate, "grad_norm": norm} | task.figures(step)
                finite = {name: value for name, value in shown.items() if math.isfinite(value)}
                figures |= finite | {"images_per_second": speed, "waiting": waiting}
                metrics.log(step, **finite, skipped=skipped, images_per_second=speed, waiting=waiting)
            step += 1
            names = {name: name for name in task.shown} | {"images_per_second": "images/s", "waiting": "waiting"}
            progress.advance(**{short: figures[name] for name, short in names.items() if name in figures})
            due, stop = distributed.on_any_rank(distributed.is_main() and clock.due(), bool(signals))
            if task.stays(step):
                task.show(step)  # before it is kept: a kill between the two has both again
            if due or task.stays(step):
                save(task, run, step, skipped=skipped)
        save(task, run, step, skipped=skipped)
        if step == total and not task.stays(step):
            task.show(step)
    report = {"steps": step, **task.report(step), **figures, "skipped": skipped}
    for name in ("images_per_second", "waiting"):
        report.pop(name, None)
    if step == total:
        run.finish(report)
    distributed.barrier()  # whoever leaves first ends the others, and the main rank may still be writing
    if stop or signals:
        _tell(f"told to stop after {step:,} of {total:,} steps, which are kept; the same command goes on")
        raise KeyboardInterrupt if signal.SIGINT in signals else SystemExit(TERMINATED)
    return report


def _tell_skipped(step: int, in_a_row: int, aside: str) -> None:
    _tell(f"the gradient of step {step} is not finite; the step is skipped{aside}")
    if in_a_row == MOST_SKIPPED:
        raise FloatingPointError(
            f"the gradients of {in_a_row} steps in a row are not finite, the last of step {step}; start again with a "
            "lower --base-lr, or with --precision fp32"
        )


def _tell(line: str) -> None:
    if distributed.is_main():
        print(line, file=sys.stderr)
