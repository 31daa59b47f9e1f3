"""What a masking can do that has weights of its own, which learn beside the autoencoder."""

from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from pretrain.mae import MAE
from pretrain.masking.batch import Masked, masked_by
from pretrain.masking.inputs import Inputs


class Learned(nn.Module):
    """A masking that is trained. In a step: `begin` with the whole batch, `scores`, `loss` of each micro-batch, and
    `accept` after the update. Its trained weights are in the run's optimizer, those of `begin` in one of its own."""

    def begin(self, inputs: Inputs, rate: float) -> None:
        """An update that comes before the step, by an optimizer of its own at the run's learning rate."""

    def scores(
        self, inputs: Inputs, progress: float
    ) -> tuple[Float[Tensor, "batch kept"], tuple[Float[Tensor, "batch ..."], ...]]:
        """Scores, the lowest of which are masked, and what `loss` needs again of each image. Moves no weight, draws
        nothing that is not keyed, and asks no other rank."""
        raise NotImplementedError

    def masked(self, inputs: Inputs, progress: float) -> Masked:
        """The masks of a batch."""
        scores, extra = self.scores(inputs, progress)
        return masked_by(scores, inputs, extra)

    def loss(
        self,
        mae: MAE,
        images: Float[Tensor, "batch 3 height width"],
        ids_visible: Int64[Tensor, "batch visible"],
        ids_predicted: Int64[Tensor, "batch predicted"],
        *extra: Tensor,
    ) -> Float[Tensor, ""]:
        """The loss of the autoencoder and of the masking, a mean over images; `extra` is as `scores` gave it."""
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
