"""Part maps that nothing was learned for, behind the learner's own interface: what learned parts have to beat.

`kmeans` is not here: it is a part learner that takes no step (`learn-parts --steps 0`), its queries k-means centres.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn import functional as F

from partlearn.encoders import Encoder, Tokens
from partlearn.foreground import Scorer, foreground_rank, foreground_score, inside
from partlearn.kmeans import spherical_kmeans
from partlearn.parts import centred_tokens
from shards.atomic import sha256_json

Name = Literal["heads", "kmeans-image", "regions", "grid", "bands"]
NAMES: tuple[str, ...] = get_args(Name)


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

    heads: the head of the last block that attends most to a cell (the rival of the paper's Table 4; as many parts as
    heads). kmeans-image: k-means on the picture's own relative tokens; a label means nothing in the next picture.
    regions: compact random regions, the cells nearest to random foreground cells. grid, bands: rectangles and stripes
    of the whole picture. All of them leave out the background, as the learner does: cells beyond `foreground_share`
    of the encoder's foreground rank.
    """

    def __init__(
        self,
        name: Name,
        encoder: Encoder,
        *,
        parts: int,
        foreground: Scorer = "border",
        foreground_share: float = 0.35,
    ):
        self.name, self.foreground, self.foreground_share = name, foreground, foreground_share
        self.shape = BaselineShape(encoder.grid, encoder.heads if name == "heads" else parts)

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
        """Part of each cell, the background last, and its rank in foreground."""
        rank = foreground_rank(foreground_score(tokens, self.foreground))
        cells = inside(rank, self.foreground_share)
        return self._parts(tokens, rank, cells).masked_fill(~cells, self.shape.parts), rank

    def _parts(
        self, tokens: Tokens, rank: Int64[Tensor, "batch patches"], cells: Bool[Tensor, "batch patches"]
    ) -> Int64[Tensor, "batch patches"]:
        grid, parts = self.shape.grid, self.shape.parts
        if self.name == "heads":
            return tokens.class_attention.argmax(dim=1)
        if self.name == "kmeans-image":
            relative = F.normalize(centred_tokens(tokens.block_tokens[:, 1:], cells), dim=-1).cpu()
            return torch.stack(
                [_clusters(own, chosen, parts) for own, chosen in zip(relative, cells.cpu(), strict=True)]
            ).to(rank.device)
        rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        if self.name == "regions":
            places = torch.stack([rows, cols], dim=-1).flatten(0, 1).float()
            return torch.stack(
                [_regions(own, chosen, places, parts) for own, chosen in zip(rank.cpu(), cells.cpu(), strict=True)]
            ).to(rank.device)
        wide = 1 if self.name == "bands" else max(n for n in range(1, int(parts**0.5) + 1) if parts % n == 0)
        high = parts // wide
        whole = (rows * high // grid) * wide + cols * wide // grid
        return whole.flatten().expand_as(rank).to(rank.device)


def _clusters(tokens: Tensor, chosen: Tensor, parts: int) -> Tensor:
    """k-means fitted on the chosen cells of one picture, always from the same draws."""
    centres = spherical_kmeans(tokens[chosen], parts, generator=torch.Generator().manual_seed(0), starts=1)
    return (tokens @ centres.T).argmax(dim=1)


def _regions(rank: Tensor, chosen: Tensor, places: Tensor, parts: int) -> Tensor:
    """Voronoi cells of random foreground cells; the draw depends on the picture, through its foreground rank alone."""
    key = int((rank * torch.arange(1, len(rank) + 1)).sum()) % 2**31
    drawn = torch.randperm(int(chosen.sum()), generator=torch.Generator().manual_seed(key))[:parts]
    return torch.cdist(places, places[chosen.nonzero().squeeze(1)[drawn]]).argmin(dim=1)
