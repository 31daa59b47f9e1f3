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
from shards.shard_set import ShardSet

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
OF_ATTENTION = ("attmask-high", "attmask-low", "attmask-hint", "automae")


def refuse_missing_labels(masking: str, shards: ShardSet) -> None:
    """Raises ValueError where a set has not what the masking needs, with the command that makes it."""
    if masking in OF_PARTS and shards.groups < 2:
        raise ValueError(
            f"--masking {masking} needs part labels, and {shards.path} has {shards.groups} group of them; make some "
            f"with `semmae extract --relabel {shards.path} --out DIR` and take --labels DIR, or take --masking random"
        )
    if masking in OF_ATTENTION:
        shards.refuse_no_attention()
