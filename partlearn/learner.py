"""The part learner as one module: tokens in, maps, labels and foreground rank out."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.frozen import Tokens
from encoders.load import BUILTIN
from encoders.whitening import centred_tokens, mean_token
from partlearn.attention import (
    Gate,
    PartAttention,
    Projections,
    Prototypes,
    Softmax,
    Temperature,
    balanced,
    part_maps,
)
from partlearn.decoder import ImageDecoder, blur
from partlearn.diffusion import diffused
from partlearn.foreground import Scorer, foreground_rank, foreground_score, object_cells, ties_of
from partlearn.kinds import Kinds
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
    from_class: bool
    """Queries come from the class token (Eq. 1), which only training teaches; without, they are prototypes alone."""
    whitened: bool
    unit: bool
    """Tokens are read at unit length."""
    diffusion: int
    softmax: Softmax
    target: Literal["features", "pixels", "both"]
    decoder_size: int
    kinds: int = 1
    """Kinds of objects with part centres of their own; learners from before there were kinds have one."""
    gate: Gate = "double"
    projections: Projections = "part"
    temperature: Temperature = "trained"
    """How Eq. 1 and 2 are computed; files that do not say are older than the choice, and are the defaults."""

    @property
    def groups(self) -> int:
        """Labels in a map: the parts, and the background when there is one."""
        return self.parts + self.background


class PartLearner(nn.Module):
    """Part attention with what it reads (tokens, foreground) and what it must rebuild (features or the image)."""

    def __init__(self, shape: LearnerShape):
        super().__init__()
        self.shape = shape
        self.attention: PartAttention | Prototypes
        if shape.from_class:
            self.attention = PartAttention(
                shape.dim,
                shape.width,
                shape.parts,
                shape.dim if shape.projections == "shared" else shape.dim // shape.heads,
                gate=shape.gate,
                projections=shape.projections,
                temperature=shape.temperature,
            )
        else:
            self.attention = Prototypes(shape.width, shape.parts)
        if shape.whitened:
            self.whitening: Tensor
            self.register_buffer("whitening", torch.zeros(shape.dim, shape.width))
        if shape.kinds > 1:
            self.kinds = Kinds(shape.dim, shape.width, shape.kinds, shape.parts)
        if shape.target != "pixels":
            self.vectors = nn.Parameter(torch.zeros(shape.parts, shape.width))
        if shape.target != "features":
            self.decoder = ImageDecoder(shape.dim, shape.parts, grid=shape.grid, size=shape.decoder_size)

    def learned_cells(self, tokens: Tokens) -> Bool[Tensor, "batch patches"]:
        """The cells parts are learned on."""
        if self.shape.where == "everywhere":
            return torch.ones(tokens.patch_tokens.shape[:2], dtype=torch.bool, device=tokens.patch_tokens.device)
        return self._object(self._score(tokens), ties_of(tokens, self.shape.foreground))

    def read(
        self, tokens: Tokens, cells: Bool[Tensor, "batch patches"]
    ) -> tuple[Float[Tensor, "batch parts patches"], Float[Tensor, "batch patches width"]]:
        """Logits of Eq. 2 and the tokens they were computed from."""
        patches = self.seen(tokens, cells)
        if self.shape.whitened:
            patches = patches @ self.whitening
        if self.shape.unit:
            patches = F.normalize(patches, dim=-1)
        patches = diffused(patches, cells, self.shape.diffusion)
        if self.shape.kinds > 1:
            own = self.kinds.centres(mean_token(tokens.block_tokens[:, 1:], cells))
            return self.attention.scale * (own @ patches.transpose(1, 2)), patches
        return self.attention.logits(tokens.block_tokens[:, 0], patches), patches

    def seen(self, tokens: Tokens, cells: Bool[Tensor, "batch patches"]) -> Float[Tensor, "batch patches dim"]:
        """The encoder's tokens, relative to their image's where so asked: what is whitened."""
        patches = tokens.block_tokens[:, 1:]
        return centred_tokens(patches, cells) if self.shape.relative else patches

    @torch.no_grad()
    def label(self, tokens: Tokens) -> tuple[Int64[Tensor, "batch patches"], Int64[Tensor, "batch patches"]]:
        """Part of each cell (argmax of unblurred maps, ties to the lower part; the background last) and its rank
        in foreground."""
        score = None if self.shape.foreground == "maps" else self._score(tokens)
        noise = ties_of(tokens, self.shape.foreground)
        everywhere = self.shape.where == "everywhere" or score is None
        cells = self.learned_cells(tokens) if everywhere else self._object(score, noise)
        logits, _ = self.read(tokens, cells)
        parts = balanced(logits, self.shape.softmax, cells).argmax(dim=1)
        if score is None:
            score = self._of_maps(part_maps(logits, self.shape.softmax, cells))
        if self.shape.background:
            parts = parts.masked_fill(~self._object(score, noise), self.shape.parts)
        return parts, foreground_rank(score, noise)

    def _object(
        self, score: Float[Tensor, "batch patches"], noise: Float[Tensor, "batch patches"] | None
    ) -> Bool[Tensor, "batch patches"]:
        return object_cells(score, self.shape.foreground_share, noise)

    def _score(self, tokens: Tokens) -> Float[Tensor, "batch patches"]:
        if self.shape.foreground == "maps":
            raise ValueError("the learned maps cannot rank the foreground that they are learned on")
        return foreground_score(tokens, self.shape.foreground)

    def _of_maps(self, maps: Float[Tensor, "batch parts patches"]) -> Float[Tensor, "batch patches"]:
        """The blurred sum of the maps."""
        grid = self.shape.grid
        return blur(maps.sum(dim=1).reshape(-1, 1, grid, grid)).flatten(1)


def load_learner(run: Path) -> tuple[PartLearner, dict[str, Any], str]:
    """The part learner of a run folder (or the `builtin` one), the description of its encoder, and the sha256 of its
    shape and weights.

    Raises:
        FileNotFoundError, CheckpointError: There is no run, no whole checkpoint in it, or one of something else.
    """
    if str(run) != "builtin" and not run.exists():
        raise FileNotFoundError(f"no parts at {run}: expected a run folder of learn-parts, or builtin")
    file = BUILTIN / "parts.safetensors" if str(run) == "builtin" else find(run)
    tensors, metadata = load_tensors(file)
    if "learner" not in metadata:
        raise CheckpointError(f"{file} holds no part learner; expected a run of `semmae learn-parts`")
    learner = PartLearner(LearnerShape(**metadata["learner"]))
    learner.load_state_dict(tensors)
    return learner.eval().requires_grad_(False), metadata["encoder"], metadata["learner_sha256"]


def shape_as_json(shape: LearnerShape) -> dict[str, Any]:
    return dataclasses.asdict(shape)
