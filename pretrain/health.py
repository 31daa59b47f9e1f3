"""Whether the encoder learns and has not collapsed, while it trains: spread of its features, and k-NN on labels."""

import math
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from encoders.monitor import Monitor
from encoders.tokens import vit_tokens
from pretrain.config import PretrainConfig
from shards.stream import Stream
from training import distributed
from training.augment import normalised, unit
from training.device import autocast
from training.schedule import ends_period

IMAGES, CHUNK = 256, 64
RARELY = 20
"""Images trained on between two looks at one image: they take a twentieth of the time of training, or less."""
LOOKS = 100
"""Looks at most in a run, beside the first and the last."""


class Health:
    """What is measured of an encoder on whole images, on the main rank while the others wait.

    Nothing is drawn and no weight is touched, so that a run has the same weights whatever is measured.
    """

    def __init__(self, config: PretrainConfig, stream: Stream, *, total: int):
        self.config, self.stream, self.total = config, stream, total
        images = len(stream.shards)
        self.period = max(RARELY * min(IMAGES, images), total * config.batch_size // LOOKS)
        self.knn_period = config.run.knn_every * images
        self._monitor = None
        if config.run.knn is not None and distributed.is_main():
            self._monitor = Monitor(config.run.knn, size=stream.shards.size, threads=config.run.threads)

    def due(self, step: int) -> bool:
        """Whether something is measured after this step; the same on every rank."""
        return self._now(step, self.period) or self._knn_now(step)

    def figures(self, encoder: VisionTransformer, step: int) -> dict[str, float]:
        """What is due; nothing beside the main rank.

        The features are means of an image's patch tokens; `knn` votes by class tokens, as the verb `knn` does.
        """
        figures, precision = dict[str, float](), self.config.run.precision
        if distributed.is_main() and self._now(step, self.period):
            features = mean_tokens(encoder, self._images, precision)
            figures |= {"effective_rank": effective_rank(features), "feature_std": feature_std(features)}
        if self._monitor and self._knn_now(step):
            figures["knn"] = self._monitor(encoder, precision)
        return figures

    @cached_property
    def _images(self) -> UInt8[Tensor, "images height width 3"]:
        return torch.from_numpy(self.stream.stored(IMAGES).images)

    def _knn_now(self, step: int) -> bool:
        return self.config.run.knn is not None and self._now(step, self.knn_period)

    def _now(self, step: int, images: int) -> bool:
        every = ends_period(step, images=images, batch_size=self.config.batch_size)
        return step in (0, self.total - 1) or every


@torch.no_grad()
def mean_tokens(
    encoder: VisionTransformer, images: UInt8[Tensor, "images height width 3"], precision: str
) -> Float[Tensor, "images dim"]:
    """The mean of each image's patch tokens after the final norm, on the CPU."""
    device = next(encoder.parameters()).device
    with autocast(device, precision):
        chunks = (normalised(unit(chunk.to(device))) for chunk in images.split(CHUNK))
        return torch.cat([vit_tokens(encoder, chunk)[:, 1:].float().mean(dim=1).cpu() for chunk in chunks])


def effective_rank(features: Float[Tensor, "images dim"]) -> float:
    """How many directions the features fill: 1 where all are alike, at most the smaller of images and dim.

        exp(-Σ p log p),   p = singular values of the features / their sum

    RankMe (arXiv:2210.02885, equation 1), in float64; nan where a feature is not finite.
    """
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + 1e-7
    return (-(share * share.log()).sum()).exp().item()


def feature_std(features: Float[Tensor, "images dim"]) -> float:
    """The standard deviation of a dimension of the features, each scaled to length 1, over the images; the mean of all
    dimensions. 0 where all are alike, 1 / sqrt(dim) where they point everywhere.

    SimSiam (arXiv:2011.10566, figure 2).
    """
    return F.normalize(features.double(), dim=1).std(dim=0).mean().item()
