"""The masks of a batch: what is stored and keyed random numbers in, visible and masked patches out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
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
    extra: tuple[Float[Tensor, "batch ..."], ...] = ()
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
        return self.images, self.ids_visible, self.ids_masked, self.ids_predicted, *self.extra


def _made(tensors: Sequence[Tensor]) -> Masked:
    images, visible, masked, predicted, *extra = tensors
    return Masked(images, visible, masked, predicted, tuple(extra))


def masked_by(scores: Float[Tensor, "batch kept"], inputs: Inputs, extra: tuple[Tensor, ...] = ()) -> Masked:
    """The images of a batch with the M patches of the lowest scores masked."""
    mask = lowest(scores, inputs.masked)
    visible, masked = split(inputs, mask)
    return Masked(torch.from_numpy(inputs.batch.images), visible, masked, predicted_of(masked, inputs), extra)


def mask_batch(inputs: Inputs, progress: float) -> Masked:
    """Keep the best patches in foreground, and mask by the strategy of the config, one that learns nothing.

    Args:
        progress: How far the run is, from 0 to 1.
    """
    return masked_by(STRATEGIES[inputs.config.masking](inputs, progress), inputs)


def noise_for_vitmae(scores: Float[Tensor, "batch patches"]) -> Float32[Tensor, "batch patches"]:
    """The mask of these scores as the `noise` of Hugging Face's ViTMAE, which shows the int(L (1 - r)) patches of the
    lowest noise: the same patches are visible there at the same mask_ratio.

    Whole numbers, each once, because its sort leaves open which of equals comes first: the rank of -score; of equals
    the later patch has the lower noise, because `lowest` masks the earlier one. In float32: half precisions would round
    them to equals. With a --keep-share below 1 ViTMAE has no way to leave a patch out.

        vit_mae(pixel_values, noise=noise_for_vitmae(STRATEGIES["semmae"](inputs, progress)))
    """
    order = scores.flip(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device, dtype=torch.float32)
    return torch.empty_like(scores, dtype=torch.float32).scatter_(1, order, places.expand_as(scores)).flip(1)


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
