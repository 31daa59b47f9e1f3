"""MAE's masking (arXiv:2111.06377): patches at random."""

from jaxtyping import Float
from torch import Tensor

from pretrain.masking.inputs import Inputs


def scores(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """Noise; `progress` changes nothing."""
    return inputs.noise
