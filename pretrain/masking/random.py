"""MAE's masking (arXiv:2111.06377): patches at random."""

from jaxtyping import Bool, Float
from torch import Tensor

from pretrain.masking.budget import masked_count


def random_masking(noise: Float[Tensor, "batch patches"], *, mask_ratio: float) -> Bool[Tensor, "batch patches"]:
    """MAE's masking (arXiv:2111.06377): the M patches of least noise; True = masked."""
    ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < masked_count(noise.shape[1], mask_ratio)
