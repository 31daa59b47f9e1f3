"""The maskings by name.

A masking gives every patch a score, and the M patches of the lowest scores are masked: the count is exact whatever the
scores are. `scores(inputs, progress)` is a pure function of a batch and of how far the run is, from 0 to 1.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from pretrain.masking import random, semmae
from pretrain.masking.inputs import Inputs

Scores = Callable[[Inputs, float], Float[Tensor, "batch kept"]]

STRATEGIES: dict[str, Scores] = {"random": random.scores, "semmae": semmae.scores}
