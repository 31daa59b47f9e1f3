"""What a masking may know of a batch."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pretrain.masking.budget import masked_count, purity_and_touched
from pretrain.masking.config import MaskingConfig
from pretrain.masking.patches import Shape, best_patches, kept_count, pool_labels, pool_mean
from shards.batches import Batch
from shards.rng import MASK, uniform

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Inputs:
    """A batch as maskings see it: the patches that take part, what is stored of them, and keyed random numbers."""

    batch: Batch
    config: MaskingConfig
    seed: int
    shape: Shape
    """Patches of an image, rows by columns."""
    groups: int
    """Labels there are: the parts, and the background where there is one."""
    background: int | None = None
    """The label that means no part, where there is one."""
    device: torch.device = CPU
    """Where masks are computed; they are the same anywhere."""

    @property
    def masked(self) -> int:
        """Patches to mask in each image."""
        return masked_count(self.kept.shape[1], self.config.mask_ratio)

    @cached_property
    def kept(self) -> Int64[Tensor, "batch kept"]:
        """Indices of the patches that take part, ascending."""
        if kept_count(self.shape, self.config.keep_share) == self.shape[0] * self.shape[1]:
            return torch.arange(self.shape[0] * self.shape[1], device=self.device).expand(len(self.batch.images), -1)
        return best_patches(self._ranks, self.shape, self.config.keep_share)

    @cached_property
    def labels(self) -> Int64[Tensor, "batch kept"]:
        """The part of each patch."""
        parts = torch.from_numpy(self.batch.parts).to(self.device)
        return self.of_kept(pool_labels(parts, self.shape))

    @cached_property
    def rank(self) -> Float[Tensor, "batch kept"]:
        """Mean foreground rank of each patch; lower is more likely foreground."""
        return self.of_kept(pool_mean(self._ranks.double(), self.shape))

    @cached_property
    def attention(self) -> Float[Tensor, "batch heads patches"]:
        """Stored class attention of each patch of the whole image, of every head."""
        return pool_mean(torch.from_numpy(self.batch.attention).to(self.device), self.shape)

    @cached_property
    def noise(self) -> Float[Tensor, "batch kept"]:
        """A number in [0, 1) for every patch."""
        return self.uniform(MASK, self.kept.shape[1])

    @property
    def everywhere(self) -> bool:
        """Whether every patch takes part."""
        return self.kept.shape[1] == self.shape[0] * self.shape[1]

    def of_kept(self, values: Tensor) -> Tensor:
        """Those of the kept patches, of values [batch, patches] of all."""
        return values if self.everywhere else values.gather(1, self.kept)

    def shares_of_parts(self, ids_masked: Int64[Tensor, "batch masked"]) -> Float[Tensor, "2"]:
        """See `purity_and_touched`."""
        mask = torch.zeros(len(ids_masked), self.shape[0] * self.shape[1], dtype=torch.bool, device=ids_masked.device)
        mask = self.of_kept(mask.scatter_(1, ids_masked, torch.ones_like(ids_masked, dtype=torch.bool)))
        return purity_and_touched(mask, self.labels, self.groups)

    def uniform(self, purpose: int, count: int) -> Float[Tensor, "batch count"]:
        """Numbers in [0, 1), keyed by (seed, epoch, image, purpose): the same on any number of ranks, in any order and
        after any resume."""
        drawn = uniform(self.seed, self.batch.epochs, self.batch.indices, purpose, count)
        return torch.from_numpy(drawn).to(self.device)

    @property
    def _ranks(self) -> Int64[Tensor, "batch cell_rows cell_cols"]:
        return torch.from_numpy(self.batch.fgrank).long().to(self.device)
