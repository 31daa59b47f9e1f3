"""Part maps that nothing was learned for, behind the learner's own interface: what learned parts have to beat.

k-means over all images is not here: it is a part learner that takes no step (`learn-parts`; the plain clusters with
relative=False, whiten=0 and diffusion=0 in `LearnConfig`).
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from encoders.frozen import Encoder, Tokens
from encoders.whitening import centred_tokens
from partlearn.foreground import (
    Scorer,
    falling,
    foreground_rank,
    foreground_score,
    object_cells,
    tie_noise,
    ties_of,
)
from partlearn.kmeans import spherical_kmeans
from shards.atomic import sha256_json

Name = Literal[
    "heads", "heads-mass", "kmeans-image", "regions", "grid", "bands", "shuffled-heads", "shuffled-kmeans-image"
]
NAMES: tuple[str, ...] = get_args(Name)
OF_HEADS: tuple[str, ...] = ("heads", "heads-mass", "shuffled-heads")
"""Those with as many parts as the encoder has heads, whatever is asked for."""
MASS = 0.6
"""Share of a head's attention that its cells hold (heads-mass): the threshold of DINO's images."""


@dataclass(frozen=True, slots=True)
class BaselineShape:
    """As much of `LearnerShape` as labelling needs."""

    grid: int
    parts: int

    @property
    def groups(self) -> int:
        """The parts, and the background."""
        return self.parts + 1


class Baseline:
    """Labels of an image by rule.

    heads: the head of the last block that attends most to a cell; as many parts as heads. kmeans-image: k-means on
    the image's own relative tokens; a label means nothing in the next image. regions: compact random regions, the
    cells nearest to random foreground cells. grid: rectangles of one area that fill the whole image, in columns of
    as many (of 5, three and two; of 2, one above the other). bands: horizontal stripes of it. Where an image's object
    has fewer cells than there are parts, kmeans-image and regions use as many parts as cells. All of them leave out the
    background, as the learner does: cells that are not the object by the encoder's foreground score.

    heads-mass: the rival of the paper's Table 4. Each head keeps the cells that hold MASS of its attention, a cell goes
    to the head that attends most to it among those that keep it; the background is what no head keeps.

    shuffled-heads, shuffled-kmeans-image: what is said of the next image of the batch, the first after the last; a
    control for what all images share. Two views of an image still agree as they did.
    """

    def __init__(
        self,
        name: Name,
        encoder: Encoder,
        *,
        parts: int,
        foreground: Scorer = "contrast",
        foreground_share: float | None = None,
    ):
        self.name, self.foreground, self.foreground_share = name, foreground, foreground_share
        self.shape = BaselineShape(encoder.grid, encoder.heads if name in OF_HEADS else parts)

    @property
    def sha256(self) -> str:
        """Identity of the rule, for plans and dataset.json."""
        return sha256_json(self.describe())

    def describe(self) -> dict[str, Any]:
        return {
            "baseline": self.name,
            "parts": self.shape.parts,
            "foreground": self.foreground,
            "foreground_share": self.foreground_share,
            **({"mass": MASS} if self.name == "heads-mass" else {}),
        }

    @property
    def shuffled(self) -> bool:
        """Whether an image has the labels of another."""
        return self.name.startswith("shuffled-")

    def labelled(self, tokens: Tokens) -> Tokens:
        """The tokens that labels are of: a shuffled baseline looks at the next image.

        Raises:
            ValueError: There is no next image.
        """
        if not self.shuffled:
            return tokens
        if len(tokens.class_token) < 2:
            raise ValueError(f"{self.name} takes the labels of the next image, so a batch needs at least two, got 1")
        return Tokens(*(getattr(tokens, name).roll(-1, dims=0) for name in Tokens.__dataclass_fields__))

    @torch.no_grad()
    def label(self, tokens: Tokens) -> tuple[Int64[Tensor, "batch patches"], Int64[Tensor, "batch patches"]]:
        """Part of each cell, the background last, and its rank in foreground.

        Raises:
            ValueError: A shuffled baseline was given one image alone.
        """
        tokens = self.labelled(tokens)
        score, noise = foreground_score(tokens, self.foreground), ties_of(tokens, self.foreground)
        rank = foreground_rank(score, noise)
        if self.name == "heads-mass":
            return heads_by_mass(tokens.class_attention, _noise_of_heads(tokens)), rank
        cells = object_cells(score, self.foreground_share, noise)
        return self._inside(tokens, rank, cells).masked_fill(~cells, self.shape.parts), rank

    def _inside(
        self, tokens: Tokens, rank: Int64[Tensor, "batch patches"], cells: Bool[Tensor, "batch patches"]
    ) -> Int64[Tensor, "batch patches"]:
        grid, parts = self.shape.grid, self.shape.parts
        rule = self.name.removeprefix("shuffled-")
        if rule == "heads":
            return greatest(tokens.class_attention, _noise_of_heads(tokens))
        if rule == "kmeans-image":
            relative = F.normalize(centred_tokens(tokens.block_tokens[:, 1:], cells), dim=-1).cpu()
            return torch.stack(
                [_clusters(own, chosen, parts) for own, chosen in zip(relative, cells.cpu(), strict=True)]
            ).to(rank.device)
        if rule == "regions":
            places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
            return torch.stack(
                [_regions(own, chosen, places, parts) for own, chosen in zip(rank.cpu(), cells.cpu(), strict=True)]
            ).to(rank.device)
        whole = rectangles(parts, 1 if rule == "bands" else round(parts**0.5), grid)
        return whole.flatten().expand_as(rank).to(rank.device)


def rectangles(parts: int, columns: int, grid: int) -> Int64[Tensor, "rows cols"]:
    """An image in `parts` rectangles of one area, as near as cells allow: columns whose width is their share of the
    parts, each cut into rows; numbered down the columns, the first of which have one part more."""
    counts = torch.full((columns,), parts // columns)
    counts[: parts % columns] += 1
    ends = counts.cumsum(0)
    cells = torch.arange(grid)
    column = torch.bucketize(cells * parts // grid, ends, right=True)
    return (ends - counts)[column] + cells[:, None] * counts[column] // grid


def greatest(
    attention: Float[Tensor, "batch heads patches"], noise: Float[Tensor, "batch heads patches"]
) -> Int64[Tensor, "batch patches"]:
    """The head that attends most to each cell; of equals that of the greatest noise."""
    return noise.masked_fill(attention < attention.amax(dim=1, keepdim=True), -1.0).argmax(dim=1)


def heads_by_mass(
    attention: Float[Tensor, "batch heads patches"], noise: Float[Tensor, "batch heads patches"]
) -> Int64[Tensor, "batch patches"]:
    """The head that attends most to a cell among those whose cells it belongs to; `heads` where there is none."""
    kept = holding(attention, MASS, noise)
    most = greatest(attention.masked_fill(~kept, -torch.inf), noise)
    return most.masked_fill(~kept.any(dim=1), attention.shape[1])


def holding(
    mass: Float[Tensor, "*rows patches"], share: float, noise: Float[Tensor, "*rows patches"]
) -> Bool[Tensor, "*rows patches"]:
    """The fewest cells of a row that hold at least `share` of its sum, the heaviest first; of equals that of the lowest
    noise."""
    order = falling(mass, noise)
    ordered = mass.gather(-1, order)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, before < share * mass.sum(-1, keepdim=True))


def _noise_of_heads(tokens: Tokens) -> Float[Tensor, "batch heads patches"]:
    """Further draws than those that rank the cells: else the cells that are first would all go to the same heads."""
    heads, patches = tokens.class_attention.shape[1:]
    return tie_noise(tokens, (1 + heads) * patches)[:, patches:].unflatten(1, (heads, patches))


def _clusters(tokens: Tensor, chosen: Tensor, parts: int) -> Tensor:
    """k-means fitted on the chosen cells of an image, always from the same draws; a part a cell where they are few."""
    count = min(parts, int(chosen.sum()))
    centres = spherical_kmeans(tokens[chosen], count, generator=torch.Generator().manual_seed(0), starts=1)
    return (tokens @ centres.T).argmax(dim=1)


def _regions(rank: Tensor, chosen: Tensor, places: Tensor, parts: int) -> Tensor:
    """Voronoi cells of random foreground cells; the draw depends on the image, through its foreground rank alone."""
    key = int((rank * torch.arange(1, len(rank) + 1)).sum()) % 2**31
    drawn = torch.randperm(int(chosen.sum()), generator=torch.Generator().manual_seed(key))[:parts]
    return torch.cdist(places, places[chosen.nonzero().squeeze(1)[drawn]]).argmin(dim=1)
