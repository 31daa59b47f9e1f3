"""What a masking may know of a batch."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from shards.batches import Batch
from shards.rng import MASK, uniform


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch as maskings see it: the patches that take part, each with its part, and keyed random numbers."""

    batch: Batch
    labels: Int64[Tensor, "batch kept"]
    groups: int
    """Labels there are: the parts, and the background where there is one."""
    masked: int
    """Patches to mask in each image."""
    gamma: float
    seed: int

    @property
    def noise(self) -> Float[Tensor, "batch kept"]:
        """A number in [0, 1) for every patch."""
        return self.uniform(MASK, self.labels.shape[1])

    def uniform(self, purpose: int, count: int) -> Float[Tensor, "batch count"]:
        """Numbers in [0, 1), keyed by (seed, epoch, image, purpose): the same on any number of ranks, in any order and
        after any resume."""
        drawn = uniform(self.seed, self.batch.epochs, self.batch.indices, purpose, count)
        return torch.from_numpy(drawn).to(self.labels.device)
