"""The part learner as one module: tokens in, maps, labels and foreground rank out."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from partlearn.affinity import diffused
from partlearn.decoder import PictureDecoder, blur
from partlearn.encoders import Tokens
from partlearn.foreground import Scorer, foreground_rank, foreground_score, object_cells
from partlearn.parts import PartAttention, Softmax, balanced, part_maps, relative_tokens
from training.checkpoint import CheckpointError, find, load_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerShape:
    """Everything needed to rebuild a part learner around its weights."""

    dim: int
    width: int
    """Of the tokens that parts are read from: `dim`, or the directions that whitening keeps."""
    heads: int
    grid: int
    parts: int
    background: bool
    foreground: Scorer | Literal["maps"]
    foreground_share: float | None
    where: Literal["foreground", "everywhere"]
    relative: bool
    diffusion: int
    softmax: Softmax
    target: Literal["features", "pixels"]
    decoder_size: int

    @property
    def groups(self) -> int:
        """Labels in a map: the parts, and the background when there is one."""
        return self.parts + self.background


class PartLearner(nn.Module):
    """Part attention with what it reads (tokens, foreground) and what it must rebuild (features or the picture)."""

    def __init__(self, shape: LearnerShape):
        super().__init__()
        self.shape = shape
        self.attention = PartAttention(shape.dim, shape.width, shape.parts, shape.dim // shape.heads)
        self.whitening: Tensor
        self.register_buffer("whitening", torch.eye(shape.dim, shape.width))
        if shape.target == "features":
            self.vectors = nn.Parameter(torch.zeros(shape.parts, shape.width))
        else:
            self.decoder = PictureDecoder(shape.dim, shape.parts, grid=shape.grid, size=shape.decoder_size)

    def learned_cells(self, tokens: Tokens) -> Bool[Tensor, "batch patches"]:
        """The cells parts are learned on."""
        if self.shape.where == "everywhere":
            return torch.ones(tokens.patch_tokens.shape[:2], dtype=torch.bool, device=tokens.patch_tokens.device)
        return object_cells(self._score(tokens, None), self.shape.foreground_share)

    def read(
        self, tokens: Tokens, cells: Bool[Tensor, "batch patches"]
    ) -> tuple[Float[Tensor, "batch parts patches"], Float[Tensor, "batch patches width"]]:
        """Logits of Eq. 2 and the tokens they were computed from."""
        patches = tokens.block_tokens[:, 1:]
        if self.shape.relative:
            patches = diffused(relative_tokens(patches, cells, self.whitening), cells, self.shape.diffusion)
        return self.attention.logits(tokens.block_tokens[:, 0], patches), patches

    def maps(self, tokens: Tokens) -> Float[Tensor, "batch parts patches"]:
        """M of Eq. 2."""
        cells = self.learned_cells(tokens)
        return part_maps(self.read(tokens, cells)[0], self.shape.softmax, cells)

    @torch.no_grad()
    def label(self, tokens: Tokens) -> tuple[Int64[Tensor, "batch patches"], Int64[Tensor, "batch patches"]]:
        """Part of each cell (argmax of unblurred maps, ties to the lower part; the background last) and its rank
        in foreground."""
        cells = self.learned_cells(tokens)
        logits, _ = self.read(tokens, cells)
        parts = balanced(logits, self.shape.softmax, cells).argmax(dim=1)
        score = self._score(tokens, part_maps(logits, self.shape.softmax, cells))
        if self.shape.background:
            parts = parts.masked_fill(~object_cells(score, self.shape.foreground_share), self.shape.parts)
        return parts, foreground_rank(score)

    def _score(
        self, tokens: Tokens, maps: Float[Tensor, "batch parts patches"] | None
    ) -> Float[Tensor, "batch patches"]:
        if self.shape.foreground != "maps":
            return foreground_score(tokens, self.shape.foreground)
        if maps is None:
            raise ValueError("the learned maps cannot rank the foreground that they are learned on")
        grid = self.shape.grid
        return blur(maps.sum(dim=1).reshape(-1, 1, grid, grid)).flatten(1)


def load_learner(run: Path) -> tuple[PartLearner, dict[str, Any], str]:
    """The part learner of a run folder, the description of its encoder, and the sha256 of its shape and weights.

    Raises:
        FileNotFoundError, CheckpointError: There is no run, no whole checkpoint in it, or one of something else.
    """
    file = find(run)
    tensors, metadata = load_tensors(file)
    if "learner" not in metadata:
        raise CheckpointError(f"{file} holds no part learner; expected a run of `semmae learn-parts`")
    learner = PartLearner(LearnerShape(**metadata["learner"]))
    learner.load_state_dict(tensors)
    return learner.eval().requires_grad_(False), metadata["encoder"], metadata["learner_sha256"]


def shape_as_json(shape: LearnerShape) -> dict[str, Any]:
    return dataclasses.asdict(shape)
