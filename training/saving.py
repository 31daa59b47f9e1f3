"""A task's checkpoints: written, and taken back where a run goes on."""

from pathlib import Path
from typing import Any

from training import checkpoint, distributed
from training.damage import MODEL
from training.run_folder import RunError, RunFolder
from training.task import Task


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
    state, stays = whole_state(task, step, skipped), task.stays(step)
    if distributed.is_main():
        checkpoint.save(
            run.path, step, tensors, metadata=task.metadata(), state=state, keep=task.keep_last, stays=stays
        )


def whole_state(task: Task, step: int, skipped: int) -> dict[str, Any]:
    """What going on after `step` steps needs beside the model."""
    return {"optimizer": task.optimizer.state_dict(), "skipped": skipped, **task.state(step)}


def resume(task: Task, run: RunFolder) -> tuple[int, int]:
    """Steps done and skipped at the newest whole checkpoint, which the task has taken back.

    Raises:
        RunError: The ranks see different checkpoints.
        CheckpointError: There are checkpoints, and each is torn.
    """
    newest = checkpoint.newest(run.path)
    if not distributed.agree(int(newest.name.removeprefix("step-")) if newest else -1):
        raise RunError(
            f"the ranks see different checkpoints in {run.path}; --out must be one folder that all of them see"
        )
    return take_back(task, newest) if newest else (0, 0)


def take_back(task: Task, folder: Path) -> tuple[int, int]:
    """Steps done and skipped at this checkpoint, whose model and state the task takes."""
    state = checkpoint.load_state(folder)
    task.load(checkpoint.load_tensors(folder / MODEL)[0], state)
    task.optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["skipped"]
