"""The masks of a batch: what is stored and keyed random numbers in, visible and masked patches out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from pretrain.masking.budget import lowest
from pretrain.masking.inputs import Inputs
from pretrain.masking.strategies import STRATEGIES
from shards.rng import PREDICTED


@dataclass(frozen=True, slots=True)
class Masked:
    """One step's images and which of their patches are seen. Patches of neither list take no part."""

    images: UInt8[Tensor, "batch height width 3"]
    ids_visible: Int64[Tensor, "batch visible"]
    ids_masked: Int64[Tensor, "batch masked"]
    ids_predicted: Int64[Tensor, "batch predicted"]
    """The masked ones that are rebuilt; all of them where --predicted does not say fewer."""
    learned: tuple[Float[Tensor, "batch ..."], ...] = ()
    """What a learned masking needs again for its own loss."""

    def to(self, device: torch.device) -> "Masked":
        """All of it on the device."""
        return _made([one.to(device, non_blocking=True) for one in self._tensors])

    def pieces(self, size: int | None) -> list["Masked"]:
        """The same images, `size` at a time (all where None), the last piece with what is left."""
        parts = (one.split(size or len(self.images)) for one in self._tensors)
        return [_made(piece) for piece in zip(*parts, strict=True)]

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.images, self.ids_visible, self.ids_masked, self.ids_predicted, *self.learned


def _made(tensors: Sequence[Tensor]) -> Masked:
    images, visible, masked, predicted, *learned = tensors
    return Masked(images, visible, masked, predicted, tuple(learned))


def masked_by(scores: Float[Tensor, "batch kept"], inputs: Inputs, learned: tuple[Tensor, ...] = ()) -> Masked:
    """The images of a batch with the M patches of the lowest scores masked."""
    mask = lowest(scores, inputs.masked)
    visible, masked = split(inputs, mask)
    return Masked(torch.from_numpy(inputs.batch.images), visible, masked, predicted_of(masked, inputs), learned)


def mask_batch(inputs: Inputs, progress: float) -> Masked:
    """Keep the best patches in foreground, and mask by the strategy of the config, one that learns nothing.

    Args:
        progress: How far the run is, from 0 to 1.
    """
    return masked_by(STRATEGIES[inputs.config.masking](inputs, progress), inputs)


def split(
    inputs: Inputs, mask: Bool[Tensor, "batch kept"]
) -> tuple[Int64[Tensor, "batch visible"], Int64[Tensor, "batch masked"]]:
    """Patch indices the encoder sees and those it does not, each ascending."""
    visible = inputs.kept.shape[1] - inputs.masked
    before = mask.cumsum(dim=1)
    places = torch.arange(inputs.kept.shape[1], device=mask.device)
    place = torch.where(mask, visible - 1 + before, places - before)
    ordered = torch.empty_like(place).scatter_(1, place, inputs.kept)
    return ordered[:, :visible], ordered[:, visible:]


def predicted_of(masked: Int64[Tensor, "batch masked"], inputs: Inputs) -> Int64[Tensor, "batch predicted"]:
    """As many of the masked patches as --predicted says, at random, ascending."""
    count = inputs.config.predicted
    if count is None or count >= masked.shape[1]:
        return masked
    chosen = lowest(inputs.uniform(PREDICTED, masked.shape[1]), count)
    return masked[chosen].reshape(len(masked), count)
