"""Figures that show a part learner going wrong; good ones say nothing about the parts (docs/log.md)."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from partlearn.losses import pairwise_cosine

IGNORED, COLLAPSED, ALIKE, SPECKLED = 0.06, 0.8, 0.9, 0.1
"""Bounds of what is complained of: a part's share times the number of parts, the largest share, mean cosine of maps,
share of lone cells."""


def health(maps: Float[Tensor, "batch parts patches"], cells: Bool[Tensor, "batch patches"]) -> dict[str, float]:
    """Means over images, inside `cells`: parts_used (of at least IGNORED / parts of the cells), largest_share,
    speckle, cosine (mean over pairs of maps), and area_0, area_1, ... (each part's share)."""
    parts = maps.shape[1]
    labels = maps.argmax(dim=1).masked_fill(~cells, parts)
    area = F.one_hot(labels, parts + 1)[..., :parts].sum(dim=1) / cells.sum(dim=1, keepdim=True).clamp(min=1)
    cosine = pairwise_cosine(maps)
    pairs = (cosine.sum(dim=(1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / (parts * (parts - 1))
    shares = {f"area_{part}": share for part, share in enumerate(area.mean(dim=0).tolist())}
    return {
        "parts_used": (area >= IGNORED / parts).sum(dim=1).float().mean().item(),
        "largest_share": area.amax(dim=1).mean().item(),
        "speckle": speckle(labels, cells),
        "cosine": pairs.mean().item(),
        **shares,
    }


def speckle(labels: Int64[Tensor, "batch patches"], cells: Bool[Tensor, "batch patches"]) -> float:
    """Share of the cells whose label none of its four neighbours has."""
    side = round(labels.shape[1] ** 0.5)
    square = F.pad(labels.reshape(-1, side, side), (1, 1, 1, 1), value=-1)
    centre = square[:, 1:-1, 1:-1]
    neighbours = (square[:, :-2, 1:-1], square[:, 2:, 1:-1], square[:, 1:-1, :-2], square[:, 1:-1, 2:])
    alone = torch.stack([centre != neighbour for neighbour in neighbours]).all(dim=0).flatten(1)
    return (alone & cells).sum().item() / max(1, int(cells.sum()))


def warnings_of(figures: dict[str, float], parts: int, *, trained: bool) -> list[str]:
    """What looks wrong in the figures of `health`, each with its likely cause; nothing where all is well.

    Args:
        trained: Steps were taken, so that the weights of the loss matter.
    """
    another = "read another --encoder-block"
    used, apart = ("raise `balance`", "raise `diversity`") if trained else (another, another)
    areas = [figures.get(f"area_{part}", 1.0) for part in range(parts)]
    found = [
        f"part {part} covers {area:.2%} of the cells: it has vanished; ask for fewer --num-parts, or {used}"
        for part, area in enumerate(areas)
        if area < IGNORED / parts
    ]
    if figures.get("largest_share", 0.0) > COLLAPSED:
        found.append(
            f"the largest part covers {figures['largest_share']:.0%} of an image's cells: the tokens of an image are "
            "alike; read another --encoder-block, or lower `diffusion`"
        )
    if figures.get("cosine", 0.0) > ALIKE:
        found.append(
            f"the maps are alike (mean cosine {figures['cosine']:.2f}): they were started alike, or rebuild nothing; "
            f"start from k-means, or {apart}"
        )
    if figures.get("speckle", 0.0) > SPECKLED:
        found.append(
            f"{figures['speckle']:.0%} of the cells share their label with no neighbour: the tokens are noise at this "
            "--grid or --encoder-block, or parts are more than they tell apart"
        )
    return found
