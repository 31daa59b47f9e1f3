"""Kinds of objects: images whose objects are alike share part centres of their own."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.whitening import whitening_of
from partlearn.kmeans import settled, spherical_kmeans

DIRECTIONS = 32
VIEWS_A_KIND = 16
"""Of fewer views than so many a kind, fewer kinds are found."""


class Kinds(nn.Module):
    """Which kind of object an image shows, and the part centres of each kind:

        kind = argmax_k c_k · unit(Vᵀ (mean token of the object - mean of those means))

    V whitens the means over the images, and c_k are their k-means centres. A kind's part centres begin as those of all
    images and settle on its own cells, so that a label keeps its meaning from kind to kind as far as it can. Eq. 1 of
    SemMAE asks the same of the class token: part queries that know what is seen.
    """

    def __init__(self, dim: int, width: int, kinds: int, parts: int):
        """`dim` of the tokens whose mean decides the kind, `width` of those that parts are read from."""
        super().__init__()
        directions = min(DIRECTIONS, dim)
        self.mean: Tensor
        self.whitening: Tensor
        self.kinds: Tensor
        self.parts: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whitening", torch.zeros(dim, directions))
        self.register_buffer("kinds", torch.zeros(kinds, directions))
        self.register_buffer("parts", torch.zeros(kinds, parts, width))

    def fit(
        self,
        means: Float[Tensor, "views dim"],
        points: Float[Tensor, "points width"],
        view_of_point: Int64[Tensor, " points"],
        centres: Float[Tensor, "parts width"],
        generator: torch.Generator,
    ) -> None:
        """Find the kinds of the views, and settle each kind's parts.

        Where there are too few views for all of the kinds (`VIEWS_A_KIND`), some are copies of others.

        Args:
            means: Mean token of each view's object.
            points: Cells of the views, as parts are read from them.
            centres: Part centres of all images.
        """
        count = len(self.kinds)
        found = max(1, min(count, len(means) // VIEWS_A_KIND))
        mean, whitening = means.mean(dim=0), whitening_of(means, self.whitening.shape[1])
        placed = _placed(means, mean, whitening)
        kinds = spherical_kmeans(placed, found, generator=generator, starts=8)
        kind_of_point = (placed @ kinds.T).argmax(dim=1)[view_of_point]
        parts = [settled(points[kind_of_point == kind], centres) for kind in range(found)]
        copies = torch.arange(count) % found
        self.mean.copy_(mean)
        self.whitening.copy_(whitening)
        self.kinds.copy_(kinds[copies])
        self.parts.copy_(torch.stack(parts)[copies])

    def centres(self, means: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch parts width"]:
        """The part centres that each image is read with, by the mean token of its object."""
        return self.parts[(_placed(means, self.mean, self.whitening) @ self.kinds.T).argmax(dim=1)]


def _placed(means: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    return F.normalize((means - mean) @ whitening, dim=1)
