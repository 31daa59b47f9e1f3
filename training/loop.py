"""The one training loop: resume, step, log, save, finish. It never asks which task it runs."""

import math
import signal
import sys
import time
from contextlib import ExitStack, closing

from training import checkpoint, distributed
from training.config import RunConfig
from training.metrics import Metrics, last_figures
from training.progress import Progress
from training.run_folder import RunError, RunFolder
from training.signals import signals_noted
from training.task import Task
from training.update import update

MOST_SKIPPED = 10
"""Steps in a row that may be skipped, because a gradient is not finite, before the run ends."""
TERMINATED = 143
"""Exit status after SIGTERM: 128 and the number of the signal."""


def train(task: Task, run: RunFolder, config: RunConfig, *, total: int, stop_after_steps: int | None = None) -> dict:
    """Take the steps of `task` that are left and return its report; when they are `total`, the run is finished.

    A gradient that is not finite, on any rank, skips its step on all of them. SIGTERM, to any rank, ends the process
    after the step under way, with a checkpoint, no DONE.json, and exit status TERMINATED; where that step was the last
    one, the run is finished first. Ctrl-C does the same and raises KeyboardInterrupt; a second one waits for nothing.

    Args:
        stop_after_steps: End early, with a checkpoint, when so many are done in all, as a kill would.

    Raises:
        FloatingPointError: MOST_SKIPPED steps in a row were skipped, or a weight is not finite; the newest checkpoint
            is whole.
        RunError: The ranks see different checkpoints.
    """
    step, skipped = _resume(task, run)
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
        clock, began, first, in_a_row = checkpoint.Clock(config.checkpoint_minutes), time.monotonic(), step, 0
        stop = False
        while step < end and not stop:
            rate = task.rate(step)
            loss, norm = update(task.optimizer, task.losses(step), rate=rate, largest_norm=task.largest_norm)
            if math.isfinite(norm):
                task.accept(step)
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                _tell_skipped(step, in_a_row)
            if step % task.log_every == 0 or step == total - 1:
                loss = distributed.mean_over_ranks(loss).item()
                shown = {"loss": loss, "lr": rate, "grad_norm": norm} | task.figures(step)
                finite = {name: value for name, value in shown.items() if math.isfinite(value)}
                figures |= finite
                speed = (step - first + 1) * task.batch_size / (time.monotonic() - began)
                metrics.log(step, **finite, skipped=skipped, images_per_second=speed)
            step += 1
            progress.advance(**{name: figures[name] for name in task.shown if name in figures})
            due, stop = distributed.on_any_rank(distributed.is_main() and clock.due(), bool(signals))
            if due:
                save(task, run, step, skipped=skipped)
        save(task, run, step, skipped=skipped)
    report = {"steps": step, **task.report(step), **figures, "skipped": skipped}
    report.pop("images_per_second", None)
    if step == total:
        run.finish(report)
    distributed.barrier()  # whoever leaves first ends the others, and the main rank may still be writing
    if stop or signals:
        _tell(f"told to stop after {step:,} of {total:,} steps, which are kept; the same command goes on")
        raise KeyboardInterrupt if signal.SIGINT in signals else SystemExit(TERMINATED)
    return report


def save(task: Task, run: RunFolder, step: int, *, skipped: int = 0) -> None:
    """Write a checkpoint on the main rank; called on all, because gathering a model may need all.

    Raises:
        FloatingPointError: A weight is not finite, of the model or beside it. A gradient can still be finite on the
            step that spoils the weights, and the newest checkpoint is where a run resumes.
    """
    tensors = task.tensors()
    trained = [weight for group in task.optimizer.param_groups for weight in group["params"]]
    if not all(bool(one.isfinite().all()) for one in (*tensors.values(), *trained)):
        raise FloatingPointError(
            f"weights are no longer finite after step {step - 1}; resume from the last checkpoint with "
            "--precision fp32, or start again with a lower --base-lr"
        )
    state = {"optimizer": task.optimizer.state_dict(), "skipped": skipped, **task.state(step)}
    if distributed.is_main():
        checkpoint.save(run.path, step, tensors, metadata=task.metadata(), state=state)


def _resume(task: Task, run: RunFolder) -> tuple[int, int]:
    """Steps done and skipped at the newest checkpoint, which the task has taken back."""
    newest = checkpoint.newest(run.path)
    step = int(newest.name.removeprefix("step-")) if newest else 0
    if not distributed.agree(step):
        raise RunError(
            f"the ranks see different checkpoints in {run.path}; --out must be one folder that all of them see"
        )
    if newest is None:
        return 0, 0
    state = checkpoint.load_state(newest)
    task.load(checkpoint.load_tensors(newest / "model.safetensors")[0], state)
    task.optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["skipped"]


def _tell_skipped(step: int, in_a_row: int) -> None:
    _tell(f"the gradient of step {step} is not finite; the step is skipped")
    if in_a_row == MOST_SKIPPED:
        raise FloatingPointError(
            f"the gradients of {in_a_row} steps in a row are not finite, the last of step {step}; start again with a "
            "lower --base-lr, or with --precision fp32"
        )


def _tell(line: str) -> None:
    if distributed.is_main():
        print(line, file=sys.stderr)
