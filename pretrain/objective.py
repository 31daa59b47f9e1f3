"""What a step minimises: the autoencoder's loss, and that of a masking which learns."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pretrain.config import PretrainConfig
from pretrain.mae import MAE
from pretrain.masking.automae import AutoMAE
from pretrain.masking.batch import Masked, mask_batch
from pretrain.masking.hpm import HardPatches
from pretrain.masking.inputs import Inputs
from pretrain.masking.learned import Learned
from shards.rng import INIT, key_of

LEARNED: dict[str, Callable[[PretrainConfig, MAE, int], Learned]] = {"hpm": HardPatches, "automae": AutoMAE}
"""The maskings that learn, by name: made of a config, the autoencoder, and the heads of the stored attention."""


class Objective(nn.Module):
    """The two networks as one, so that ranks share the gradients of both."""

    def __init__(self, mae: MAE, masking: Learned | None):
        super().__init__()
        self.mae, self.masking = mae, masking

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        ids_visible: Int64[Tensor, "batch visible"],
        ids_predicted: Int64[Tensor, "batch predicted"],
        *extra: Tensor,
    ) -> Float[Tensor, ""]:
        """The loss of these images, a mean over them."""
        if self.masking is None:
            return self.mae(images, ids_visible, ids_predicted)
        return self.masking.loss(self.mae, images, ids_visible, ids_predicted, *extra)

    def masked(self, inputs: Inputs, progress: float) -> Masked:
        """The masks of a batch, by the masking of the config, whether it learns or not."""
        return mask_batch(inputs, progress) if self.masking is None else self.masking.masked(inputs, progress)

    def tensors(self) -> dict[str, Tensor]:
        """The autoencoder's by its own names, the masking's behind `masking.`"""
        own = {} if self.masking is None else self.masking.state_dict(prefix="masking.")
        return self.mae.state_dict() | own

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("masking.")}
        self.mae.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in own})
        if self.masking is not None:
            self.masking.load_state_dict({name.removeprefix("masking."): tensor for name, tensor in own.items()})


def new_masking(config: PretrainConfig, mae: MAE, heads: int) -> Learned | None:
    """The masking of a config where it learns, its weights drawn from the seed.

    Args:
        heads: Heads of the stored attention.
    """
    if config.masking not in LEARNED:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(key_of(config.seed, 0, INIT)))  # seed + 1 would be the draws of the next seed's model
        return LEARNED[config.masking](config, mae, heads)
