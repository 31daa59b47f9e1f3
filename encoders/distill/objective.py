"""What the loop of the verb `encoder` asks of the thing it trains."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from training.augment import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one step. The losses are of this rank's images and add up to what is minimised; `shown` are figures of the
    whole batch, `told_apart` among them: near 0 when the encoder says the same of every image. All are tensors on the
    device: whoever reads a number waits until everything before it is computed."""

    of_class: Float[Tensor, ""]
    of_patch: Float[Tensor, ""]
    shown: dict[str, Float[Tensor, ""]]


class Objective(nn.Module):
    """Self-distillation (`StudentTeacher`) or distillation from a larger encoder (`FromTeacher`)."""

    saved: str
    """Name of the submodule that is the encoder; everything else is state, kept for resuming."""
    image_size: int
    """Side of the squares that crops are cut from, in pixels."""
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    """What the encoder's pixels are normalised by."""

    @property
    def encoder(self) -> VisionTransformer:
        return getattr(self, self.saved)

    def losses(self, images: UInt8[Tensor, "batch height width 3"], *, step: int) -> Losses:
        """Both losses of this rank's block of the batch: a function of the images, the seed, the step and the state.

        Computes the ViTs in the run's precision, everything else in fp32. Reads nothing back from the device, but for
        the whitening of a teacher's tokens, now and then.
        """
        raise NotImplementedError

    def follow(self, progress: float) -> None:
        """What comes after an update, `progress` (0 to 1) through the run."""
