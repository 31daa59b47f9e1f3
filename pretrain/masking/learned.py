"""What a masking can do that has weights of its own, which learn beside the autoencoder."""

from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from pretrain.mae import MAE
from pretrain.masking.batch import Masked
from pretrain.masking.inputs import Inputs


class Learned(nn.Module):
    """A masking that is trained. In a step: `begin` with the whole batch, `masked`, `loss` of each micro-batch, and
    `accept` after the update. Its trained weights are in the run's optimizer, those of `begin` in one of its own."""

    def begin(self, inputs: Inputs, rate: float) -> None:
        """An update that comes before the step, by an optimizer of its own at the run's learning rate."""

    def masked(self, inputs: Inputs, progress: float) -> Masked:
        """The masks of a batch, with what `loss` needs again of each image."""
        raise NotImplementedError

    def loss(
        self,
        mae: MAE,
        images: Float[Tensor, "batch 3 height width"],
        ids_visible: Int64[Tensor, "batch visible"],
        ids_predicted: Int64[Tensor, "batch predicted"],
        *learned: Tensor,
    ) -> Float[Tensor, ""]:
        """The loss of the autoencoder and of the masking, a mean over images; `learned` is as `masked` gave it."""
        raise NotImplementedError

    def accept(self, mae: MAE, progress: float) -> None:
        """What follows an update, such as a teacher's step; left out where the step was skipped."""

    def figures(self) -> dict[str, float]:
        """What the log says of the last step, over all ranks."""
        return {}

    def own_state(self) -> dict[str, Any]:
        """What going on needs beside the weights, such as the optimizer of `begin`."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""
