"""The learning rate as a pure function of the step."""

import math
import sys

from training import distributed


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `final` at `total_steps`.

        warm-up:  peak · step / warmup_steps
        after:    final + (peak - final) · (1 + cos(pi · t)) / 2,   t from 0 to 1

    The schedule of MAE (arXiv:2111.06377, appendix A), taken per step as its code does.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (peak - final) * (1 + math.cos(math.pi * share)) / 2


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1; DINO's teacher momentum follows it."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def ends_period(step: int, *, images: int, batch_size: int) -> bool:
    """Whether this step, from 0, is the one in which another `images` have been taken since the beginning."""
    return (step + 1) * batch_size // images > step * batch_size // images


def warn_of_a_long_warmup(warmup_steps: int, total_steps: int) -> None:
    """One line on stderr where half a run or more is warm-up: its learning rate hardly falls, or never rises."""
    if total_steps and 2 * warmup_steps >= total_steps and distributed.is_main():
        print(
            f"the learning rate rises for {warmup_steps:,} of {total_steps:,} steps; lower --warmup-epochs, or raise "
            "--epochs",
            file=sys.stderr,
        )
