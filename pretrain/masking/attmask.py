"""AttMask (arXiv:2203.12719): patches that the stored class attention is highest on; or lowest, MST's choice.

Their ratio is drawn between .1 and .5 and half of the images have no mask; here every image has the run's.
"""

from jaxtyping import Float
from torch import Tensor

from pretrain.masking.inputs import Inputs
from shards.rng import HINT

HINTS = 0.1
"""Share of the patches, those of highest attention, out of which hints are taken."""


def high(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """Minus the attention; `progress` changes nothing."""
    return -total_attention(inputs)


def low(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """The attention; `progress` changes nothing."""
    return total_attention(inputs)


def hint(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """As `high`, but a few of the highest are shown, at random; `progress` changes nothing."""
    attention = total_attention(inputs)
    patches = attention.shape[1]
    highest = attention.argsort(dim=1, descending=True, stable=True)[:, : int(HINTS * patches)]
    shown = min(int(inputs.config.hint_share * inputs.masked), most_hints(patches, inputs.masked))
    drawn = inputs.uniform(HINT, highest.shape[1]).argsort(dim=1, stable=True)[:, :shown]
    return (-attention).scatter(1, highest.gather(1, drawn), 1.0)


def most_hints(patches: int, masked: int) -> int:
    """As many as the highest tenth has, and as other patches can be masked for."""
    return min(int(HINTS * patches), patches - masked)


def total_attention(inputs: Inputs) -> Float[Tensor, "batch kept"]:
    """Summed over heads, one after another (the same bits on any device), in fp64; equals are ordered by noise that is
    too small to order anything else."""
    heads = inputs.attention.unbind(dim=1)
    total = inputs.of_kept(sum(heads[1:], start=heads[0])).double()
    return (total + 1e-30) * (1 + 2.0**-26 * inputs.noise.double())
