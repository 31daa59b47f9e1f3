"""The masks of a batch: stored labels and keyed random numbers in, visible and masked patches out."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from pretrain.config import PretrainConfig
from pretrain.masking.patches import best_patches, pool_labels, split
from pretrain.masking.random import random_masking
from pretrain.masking.semmae import semantic_masking
from shards.batches import Batch
from shards.rng import MASK, PART_ORDER, uniform

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Masked:
    """One step's images and which of their patches are seen. Patches of neither list take no part."""

    images: UInt8[Tensor, "batch height width 3"]
    ids_visible: Int64[Tensor, "batch visible"]
    ids_masked: Int64[Tensor, "batch masked"]
    mask: Bool[Tensor, "batch kept"]
    labels: Int64[Tensor, "batch kept"]


def mask_batch(
    batch: Batch, config: PretrainConfig, *, side: int, groups: int, alpha: float, device: torch.device = CPU
) -> Masked:
    """Keep the best patches in foreground, and mask; every draw keyed by (seed, epoch, image, purpose).

    Args:
        device: Where the masks are computed and stay; the same masks anywhere. The images stay where they are.
    """
    parts, fgrank = (torch.from_numpy(cells).long().to(device) for cells in (batch.parts, batch.fgrank))
    kept = best_patches(fgrank, side, config.keep_share)
    labels = pool_labels(parts, side, groups).gather(1, kept)
    noise = _keyed(batch, config.seed, MASK, kept.shape[1]).to(device)
    if config.masking == "random":
        mask = random_masking(noise, mask_ratio=config.mask_ratio)
    else:
        order = _keyed(batch, config.seed, PART_ORDER, groups).to(device)
        mask = semantic_masking(labels, noise, order, mask_ratio=config.mask_ratio, alpha=alpha)
    return Masked(torch.from_numpy(batch.images), *split(kept, mask), mask, labels)


def _keyed(batch: Batch, seed: int, purpose: int, count: int) -> Float[Tensor, "batch count"]:
    return torch.from_numpy(uniform(seed, batch.epochs, batch.indices, purpose, count))
