"""Part maps that nothing was learned for, behind the learner's own interface: what learned parts have to beat.

`kmeans` is not here: it is a part learner that takes no step (`learn-parts --steps 0`), its queries k-means centres.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from partlearn.encoders import Encoder, Tokens
from partlearn.foreground import Scorer, foreground_rank, foreground_score, object_cells
from partlearn.kmeans import spherical_kmeans
from partlearn.parts import centred_tokens
from shards.atomic import sha256_json

Name = Literal[
    "heads", "heads-mass", "kmeans-image", "regions", "grid", "bands", "shuffled-heads", "shuffled-kmeans-image"
]
NAMES: tuple[str, ...] = get_args(Name)
OF_HEADS: tuple[str, ...] = ("heads", "heads-mass", "shuffled-heads")
"""Those with as many parts as the encoder has heads, whatever is asked for."""
MASS = 0.6
"""Share of a head's attention that its cells hold (heads-mass): the threshold of DINO's pictures."""


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
    """Labels of a picture by rule.

    heads: the head of the last block that attends most to a cell; as many parts as heads. kmeans-image: k-means on
    the picture's own relative tokens; a label means nothing in the next picture. regions: compact random regions, the
    cells nearest to random foreground cells. grid, bands: rectangles and stripes of the whole picture. All of them
    leave out the background, as the learner does: cells that are not the object by the encoder's foreground score.

    heads-mass: the rival of the paper's Table 4. Each head keeps the cells that hold MASS of its attention, a cell goes
    to the head that attends most to it among those that keep it; the background is what no head keeps.

    shuffled-heads, shuffled-kmeans-image: labels and rank of the next picture of the batch, the first after the last;
    a control for what all pictures share. Two views of a picture still agree as they did.
    """

    def __init__(
        self,
        name: Name,
        encoder: Encoder,
        *,
        parts: int,
        foreground: Scorer = "border",
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
        }

    @torch.no_grad()
    def label(self, tokens: Tokens) -> tuple[Int64[Tensor, "batch patches"], Int64[Tensor, "batch patches"]]:
        """Part of each cell, the background last, and its rank in foreground.

        Raises:
            ValueError: A shuffled baseline was given one picture alone.
        """
        score = foreground_score(tokens, self.foreground)
        rank = foreground_rank(score)
        if self.name == "heads-mass":
            return heads_by_mass(tokens.class_attention), rank
        cells = object_cells(score, self.foreground_share)
        parts = self._inside(tokens, rank, cells).masked_fill(~cells, self.shape.parts)
        if not self.name.startswith("shuffled-"):
            return parts, rank
        if len(rank) < 2:
            raise ValueError(f"{self.name} takes the labels of the next picture, so a batch needs at least two, got 1")
        return parts.roll(-1, dims=0), rank.roll(-1, dims=0)

    def _inside(
        self, tokens: Tokens, rank: Int64[Tensor, "batch patches"], cells: Bool[Tensor, "batch patches"]
    ) -> Int64[Tensor, "batch patches"]:
        grid, parts = self.shape.grid, self.shape.parts
        rule = self.name.removeprefix("shuffled-")
        if rule == "heads":
            return tokens.class_attention.argmax(dim=1)
        if rule == "kmeans-image":
            relative = F.normalize(centred_tokens(tokens.block_tokens[:, 1:], cells), dim=-1).cpu()
            return torch.stack(
                [_clusters(own, chosen, parts) for own, chosen in zip(relative, cells.cpu(), strict=True)]
            ).to(rank.device)
        rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        if rule == "regions":
            places = torch.stack([rows, cols], dim=-1).flatten(0, 1).float()
            return torch.stack(
                [_regions(own, chosen, places, parts) for own, chosen in zip(rank.cpu(), cells.cpu(), strict=True)]
            ).to(rank.device)
        wide = 1 if rule == "bands" else max(n for n in range(1, int(parts**0.5) + 1) if parts % n == 0)
        high = parts // wide
        whole = (rows * high // grid) * wide + cols * wide // grid
        return whole.flatten().expand_as(rank).to(rank.device)


def refuse_lone_pictures(name: str, shard_sizes: Sequence[int], batch_size: int) -> None:
    """Before a build: batches never straddle shards, and shuffled labels are those of the next picture of the batch.

    Raises:
        ValueError: `name` is shuffled, and a shard would begin or end with a batch of one picture.
    """
    if not name.startswith("shuffled-"):
        return
    for number, size in enumerate(shard_sizes):
        if size % batch_size == 1 or batch_size == 1:
            raise ValueError(
                f"{name} takes the labels of the next picture of the batch, but shard {number}, {size} pictures in "
                f"batches of {batch_size}, would have a batch of one; choose another "
                f"{'--samples-per-shard' if size == 1 else '--batch-size'}"
            )


def heads_by_mass(attention: Float[Tensor, "batch heads patches"]) -> Int64[Tensor, "batch patches"]:
    """The head that attends most to a cell among those whose cells it belongs to; `heads` where there is none."""
    kept = holding(attention, MASS)
    most = attention.masked_fill(~kept, -torch.inf).argmax(dim=1)
    return most.masked_fill(~kept.any(dim=1), attention.shape[1])


def holding(mass: Float[Tensor, "*rows patches"], share: float) -> Bool[Tensor, "*rows patches"]:
    """The fewest cells of a row that hold at least `share` of its sum, the heaviest first; of equals the first."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, before < share * mass.sum(-1, keepdim=True))


def _clusters(tokens: Tensor, chosen: Tensor, parts: int) -> Tensor:
    """k-means fitted on the chosen cells of one picture, always from the same draws."""
    centres = spherical_kmeans(tokens[chosen], parts, generator=torch.Generator().manual_seed(0), starts=1)
    return (tokens @ centres.T).argmax(dim=1)


def _regions(rank: Tensor, chosen: Tensor, places: Tensor, parts: int) -> Tensor:
    """Voronoi cells of random foreground cells; the draw depends on the picture, through its foreground rank alone."""
    key = int((rank * torch.arange(1, len(rank) + 1)).sum()) % 2**31
    drawn = torch.randperm(int(chosen.sum()), generator=torch.Generator().manual_seed(key))[:parts]
    return torch.cdist(places, places[chosen.nonzero().squeeze(1)[drawn]]).argmin(dim=1)
