"""What a verb hands the training loop: what a step computes, what is saved, what is logged."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class Task:
    """What is trained. The loop calls every method on every rank."""

    name: str
    """What the progress line calls it."""
    batch_size: int
    """Images a step, over all ranks."""
    optimizer: torch.optim.Optimizer
    largest_norm = math.inf
    """Gradients of a greater norm are scaled down to it."""
    log_every = 1
    """Steps between two lines of metrics.jsonl; the last step always has one."""
    begun = False
    """Whether the step to come was begun before: what it updates ahead of its loss is not updated again. True for a
    step that was written aside (`training/nonfinite.py`)."""
    keep_last = 2
    """Newest checkpoints that are kept, beside those that stay."""
    shown: tuple[str, ...] = ("loss",)
    """The figures in the progress line."""

    def rate(self, step: int) -> float:
        """The learning rate of a step; steps count from 0."""
        raise NotImplementedError

    def read(self, step: int) -> None:
        """Take the batch of this step; what that takes is time spent waiting for data."""

    def losses(self, step: int) -> Iterator[Float[Tensor, ""]]:
        """The loss of each micro-batch, weighted so that they add up to the loss of this rank's batch.

        The loop goes backward through each before it asks for the next. When there is no next, the gradients are those
        of the whole batch: their mean over the ranks.
        """
        raise NotImplementedError

    def accept(self, step: int) -> None:
        """What follows an update, such as a teacher's step; left out where the step was skipped."""

    def figures(self, step: int) -> dict[str, float]:
        """What the log says of a step beside loss, rate and gradient: of the whole batch, not of one rank's."""
        return {}

    def measures(self, step: int) -> bool:
        """Whether `figures` says more of this step than of others, so that it is logged too; the same on every rank."""
        return False

    def samples(self) -> dict[str, Any]:
        """What this rank took in its last step, as JSON values: what a step that was skipped is looked into by."""
        return {}

    def stays(self, step: int) -> bool:
        """Whether a checkpoint is written after so many steps, and never removed; the same on every rank."""
        return False

    def show(self, step: int) -> None:
        """Write pictures of what is trained: at the end, and where a checkpoint stays."""

    def tensors(self) -> dict[str, Tensor]:
        """The model, for model.safetensors; gathered from the ranks where they share it."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """What rebuilds the model around its tensors."""
        raise NotImplementedError

    def state(self, step: int) -> dict[str, Any]:
        """What going on after `step` steps needs beside tensors and optimizer."""
        return {}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take back what `tensors` and `state` gave."""
        raise NotImplementedError

    def open(self, step: int) -> None:
        """Begin to read batches, the one of `step` first."""

    def close(self) -> None:
        """Stop reading, however the loop ends."""

    def report(self, step: int) -> dict[str, Any]:
        """What DONE.json says beside the last figures."""
        return {}
