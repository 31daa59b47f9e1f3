"""A step whose gradient is not finite: what it saw is written aside, and can be computed again."""

from contextlib import closing
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from shards.atomic import json_bytes
from training import checkpoint, distributed
from training.run_folder import RunFolder
from training.saving import take_back, whole_state
from training.task import Task
from training.update import update

SAMPLES = "samples.json"
MOST = 3
"""Steps of a run that are written aside; each is as large as a checkpoint."""


def set_aside(task: Task, run: RunFolder, step: int, loss: Float[Tensor, ""], *, skipped: int) -> Path | None:
    """Write `run/nonfinite/step-NNNNNNNN/`: a checkpoint of the step, begun and then skipped, and samples.json with
    every rank's samples and loss. Called on every rank; None where MOST are there already, or this one is.

    Args:
        loss: This rank's.
        skipped: Steps skipped before this one.
    """
    folder = run.path / "nonfinite" / f"step-{step:08d}"
    others = list(folder.parent.glob("step-*"))
    (wanted,) = distributed.on_any_rank(distributed.is_main() and folder not in others and len(others) < MOST)
    if not wanted:
        return None
    ranks = distributed.gathered({"rank": distributed.rank(), "loss": str(loss.item()), **task.samples()})
    tensors, state = task.tensors(), whole_state(task, step, skipped)
    if distributed.is_main():
        told = json_bytes({"step": step, "ranks": ranks})
        checkpoint.write(folder, step, tensors, metadata=task.metadata(), state=state, beside={SAMPLES: told})
    return folder


def again(task: Task, folder: Path) -> tuple[float, float]:
    """Loss of the whole batch and norm of its gradient in the step that `set_aside` wrote to `folder`, computed on this
    process alone; the norm is nan where it is not finite. `task` is new, and used up."""
    step, _ = take_back(task, folder)
    task.begun = (folder / SAMPLES).is_file()  # a checkpoint of the run is from before its step
    task.open(step)
    with closing(task):
        task.read(step)
        loss, norm = update(task.optimizer, task.losses(step), rate=0.0)
    return loss.item(), norm
