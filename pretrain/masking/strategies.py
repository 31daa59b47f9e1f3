"""The maskings by name.

A masking gives every patch a score, and the M patches of the lowest scores are masked: the count is exact whatever the
scores are. `scores(inputs, progress)` is a pure function of a batch and of how far the run is, from 0 to 1. Maskings
that learn have weights besides (`learned.py`).
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from pretrain.masking import attmask, block, color_noise, foreground, random, semmae
from pretrain.masking.inputs import Inputs

Scores = Callable[[Inputs, float], Float[Tensor, "batch kept"]]

STRATEGIES: dict[str, Scores] = {
    "random": random.scores,
    "block": block.scores,
    "color-noise": color_noise.scores,
    "attmask-high": attmask.high,
    "attmask-low": attmask.low,
    "attmask-hint": attmask.hint,
    "semmae": semmae.scores,
    "foreground": foreground.scores,
}

OF_PARTS = ("semmae",)
"""Maskings that read part labels."""
OF_ATTENTION = ("attmask-high", "attmask-low", "attmask-hint", "automae")
"""Maskings that read stored class attention."""
