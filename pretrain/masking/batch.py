"""The masks of a batch: stored labels and keyed random numbers in, visible and masked patches out."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from pretrain.config import PretrainConfig
from pretrain.masking.budget import lowest, masked_count
from pretrain.masking.inputs import Inputs
from pretrain.masking.patches import best_patches, pool_labels, split
from pretrain.masking.strategies import STRATEGIES
from shards.batches import Batch

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Masked:
    """One step's images and which of their patches are seen. Patches of neither list take no part."""

    images: UInt8[Tensor, "batch height width 3"]
    ids_visible: Int64[Tensor, "batch visible"]
    ids_masked: Int64[Tensor, "batch masked"]
    mask: Bool[Tensor, "batch kept"]
    labels: Int64[Tensor, "batch kept"]

    def pieces(self, size: int | None) -> list["Masked"]:
        """The same images, `size` at a time (all where None), the last piece with what is left."""
        parts = [getattr(self, field.name).split(size or len(self.images)) for field in fields(self)]
        return [Masked(*piece) for piece in zip(*parts, strict=True)]


def mask_batch(
    batch: Batch, config: PretrainConfig, *, side: int, groups: int, progress: float, device: torch.device = CPU
) -> Masked:
    """Keep the best patches in foreground, and mask by the strategy of `config`.

    Args:
        progress: How far the run is, from 0 to 1.
        device: Where the masks are computed and stay; the same masks anywhere. The images stay where they are.
    """
    parts, fgrank = (torch.from_numpy(cells).long().to(device) for cells in (batch.parts, batch.fgrank))
    kept = best_patches(fgrank, side, config.keep_share)
    labels = pool_labels(parts, side, groups).gather(1, kept)
    masked = masked_count(kept.shape[1], config.mask_ratio)
    inputs = Inputs(batch, labels, groups, masked, config.gamma, config.seed)
    mask = lowest(STRATEGIES[config.masking](inputs, progress), masked)
    return Masked(torch.from_numpy(batch.images), *split(kept, mask), mask, labels)
