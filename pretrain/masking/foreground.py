"""AutoMAE's object-prior study (arXiv:2303.06583): the foreground is masked with a higher probability."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pretrain.masking.budget import lowest
from pretrain.masking.inputs import Inputs
from shards.rng import MASK


def scores(inputs: Inputs, progress: float) -> Float[Tensor, "batch kept"]:
    """Noise; a patch of the foreground has the lowest of as many numbers as --foreground-odds says.

    So patches are masked one after another, each next one drawn with these odds for the foreground: the lowest of n
    uniform numbers comes first n times as often as one. `progress` changes nothing.
    """
    odds, patches = inputs.config.foreground_odds, inputs.kept.shape[1]
    noise = inputs.uniform(MASK, odds * patches).unflatten(1, (odds, patches))
    return torch.where(inside_foreground(inputs), noise.amin(dim=1), noise[:, 0])


def inside_foreground(inputs: Inputs) -> Bool[Tensor, "batch kept"]:
    """Patches that the labels do not call background; where no label is that, or --foreground-share says how many, the
    best by rank."""
    share = inputs.config.foreground_share
    if share is None and inputs.background is not None:
        return inputs.labels != inputs.background
    return lowest(inputs.rank, max(1, round((share or 0.5) * inputs.rank.shape[1])))
