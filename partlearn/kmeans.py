"""Lloyd's k-means on unit vectors, in torch: scikit-learn would be a heavy dependency for twenty lines."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 30


def spherical_kmeans(
    points: Float[Tensor, "points dim"],
    count: int,
    *,
    generator: torch.Generator,
    rounds: int = ROUNDS,
    starts: int = 4,
) -> Float[Tensor, "count dim"]:
    """Unit centres that maximise the mean cosine to the nearest; the best of `starts` k-means++ seedings.

    A centre that loses all its points moves to the point worst served.

    Raises:
        ValueError: There are fewer points than centres.
    """
    if len(points) < count:
        raise ValueError(
            f"k-means of {count} parts needs as many cells, and there are {len(points)}; ask for fewer --num-parts, or "
            "give more images or a finer --grid"
        )
    found = [settled(points, _spread(points, count, generator), rounds) for _ in range(starts)]
    return max(found, key=lambda centres: (points @ centres.T).amax(dim=1).mean().item())


def settled(
    points: Float[Tensor, "points dim"], centres: Float[Tensor, "count dim"], rounds: int = ROUNDS
) -> Float[Tensor, "count dim"]:
    """Lloyd's rounds from given centres: each becomes the direction of the sum of its points. Where points are fewer
    than centres, the centres stay."""
    if len(points) < len(centres):
        return centres
    for _ in range(rounds):
        cosine, nearest = (points @ centres.T).max(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = torch.bincount(nearest, minlength=len(centres)) == 0
        sums[empty] = points[cosine.argsort()[: int(empty.sum())]]
        centres = F.normalize(sums, dim=1)
    return centres


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre drawn in proportion to its squared distance from the chosen ones."""
    chosen = [points[torch.randint(len(points), (1,), generator=generator)]]
    while len(chosen) < count:
        distance = (1 - (points @ torch.cat(chosen).T).amax(dim=1)).clamp(min=1e-9)
        chosen.append(points[torch.multinomial(distance, 1, generator=generator)])
    return torch.cat(chosen)
