"""Step 0 of the part learner: k-means centres, the encoder's attention heads, or chance."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.models.eva import Eva
from torch import Tensor

from encoders.frozen import Encoder, Tokens
from encoders.whitening import mean_token, whitening_of
from partlearn.config import LearnConfig
from partlearn.crops import TokenCrops
from partlearn.kmeans import spherical_kmeans
from partlearn.learner import PartLearner
from training.progress import Progress

PROTOTYPE_SCALE = 10.0
START_CROPS, START_CELLS = 2048, 64
"""k-means starts from so many views, and so many cells of each."""


@torch.no_grad()
def start(learner: PartLearner, config: LearnConfig, encoder: Encoder, crops: TokenCrops) -> None:
    """Queries of step 0: the encoder's heads, random ones, or k-means centres of the first batches' tokens.

    Raises:
        ValueError: The heads are asked for of an encoder with rotary positions, or where no block follows.
    """
    generator = torch.Generator().manual_seed(config.seed)
    attention: Any = learner.attention
    if config.init != "kmeans":
        if config.init == "heads":
            if isinstance(encoder.model, Eva):
                raise ValueError(
                    f"the heads of {config.encoder} turn their queries and keys by position, and part queries have "
                    "none; take init kmeans or random"
                )
            if encoder.block == encoder.depth:
                raise ValueError(
                    f"init heads needs a block that reads the tokens, and none follows block {encoder.depth - 1}; "
                    "lower --encoder-block"
                )
            attention.start_at_heads(encoder.blocks[encoder.block].attn, generator)
        else:
            attention.start_at_random(generator)
        if config.target != "pixels":
            learner.vectors.copy_(0.02 * torch.randn(learner.vectors.shape, generator=generator))
        return
    first = _first(learner, crops)
    if learner.shape.whitened:
        points = _flat(_drawn(first, learner.seen, generator))
        learner.whitening.copy_(whitening_of(points, learner.shape.width))  # fp64: not on every accelerator
    drawn = _drawn(first, lambda tokens, cells: learner.read(tokens, cells)[1], generator)
    centres = spherical_kmeans(_flat(drawn), config.num_parts, generator=generator)
    attention.start_at_prototypes(centres, PROTOTYPE_SCALE, generator)
    if learner.shape.kinds > 1:
        cells_of_view = torch.tensor([own.shape[1] for own in drawn for _ in own])
        view_of_point = torch.arange(len(cells_of_view)).repeat_interleave(cells_of_view)
        learner.kinds.fit(_means(first), _flat(drawn), view_of_point, centres, generator)
    if config.target != "pixels":
        learner.vectors.copy_(centres)


def _means(first: list[tuple[Tokens, Bool[Tensor, "batch patches"]]]) -> Float[Tensor, "views dim"]:
    """Mean token of each view's learned cells."""
    return torch.cat([mean_token(tokens.block_tokens[:, 1:].float(), cells.cpu()) for tokens, cells in first])


def _first(learner: PartLearner, crops: TokenCrops) -> list[tuple[Tokens, Bool[Tensor, "batch patches"]]]:
    """What the learner reads of the first START_CROPS views (all, of fewer) and its cells of them; in fp16, in the
    machine's memory: 0.6 MB a view of ViT-S on 28x28 cells. So each is encoded once, and read twice. What it does
    not read of `Tokens` is left empty."""
    progress = Progress(min(START_CROPS, crops.count), "k-means reads", "crops")
    first = []
    with closing(progress), closing(crops.batches(step=0)) as batches:
        for view in batches:
            cells, read = learner.learned_cells(view.tokens), view.tokens.block_tokens.half().cpu()
            first.append((Tokens(read[:, 0], read[:, :0], read, read.new_empty(len(cells), 1, 0)), cells))
            progress.advance(min(len(cells), progress.total - progress.done))
            if progress.done == progress.total:
                return first
    raise AssertionError("views never end")


def _drawn(
    first: list[tuple[Tokens, Bool[Tensor, "batch patches"]]],
    read: Callable[[Tokens, Tensor], Tensor],
    generator: torch.Generator,
) -> list[Float[Tensor, "_ _ width"]]:
    """START_CELLS learned cells, drawn at random, of each view, as `read` gives them; in the machine's memory."""
    points = []
    for halved, cells in first:
        order = torch.rand(cells.shape, generator=generator).to(cells.device).masked_fill(~cells, 2.0).argsort(dim=1)
        drawn = order[:, : min(START_CELLS, int(cells.sum(dim=1).min()))]
        tokens = read(replace(halved, block_tokens=halved.block_tokens.to(cells.device).float()), cells)
        points.append(tokens.gather(1, drawn[..., None].expand(-1, -1, tokens.shape[2])).cpu())
    return points


def _flat(points: list[Float[Tensor, "_ _ width"]]) -> Float[Tensor, "cells width"]:
    return torch.cat([own.flatten(0, 1) for own in points])
