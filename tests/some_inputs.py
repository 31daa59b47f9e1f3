"""A batch as maskings see it, of random labels, ranks and attention."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.config import PretrainConfig, StreamRun
from pretrain.mae import MAE
from pretrain.masking.inputs import Inputs
from pretrain.masking.strategies import STRATEGIES
from pretrain.objective import LEARNED, new_masking
from shards.batches import Batch


def inputs_of(
    masking: str,
    *,
    images: int = 4,
    shape: tuple[int, int] = (14, 14),
    cells: tuple[int, int] | None = None,
    groups: int = 7,
    seed: int = 0,
    epoch: int = 3,
    **settings: Any,
) -> Inputs:
    """Drawn by `seed`; `cells` of labels are as many as there are patches, where nothing else is said."""
    random = np.random.default_rng(seed)
    square = cells or shape
    ranks = np.stack([random.permutation(square[0] * square[1]) for _ in range(images)])
    batch = Batch(
        images=random.integers(0, 256, (images, 8 * shape[0], 8 * shape[1], 3)).astype(np.uint8),
        parts=random.integers(0, groups, (images, *square)).astype(np.uint8),
        fgrank=ranks.reshape(images, *square).astype(np.uint16),
        class_ids=np.zeros(images, np.int64),
        indices=np.arange(images) + 10,
        epochs=np.full(images, epoch),
        position=0,
        attn=random.integers(0, 256, (images, 3, *square)).astype(np.uint8),
        attn_peak=random.random((images, 3)).astype(np.float32),
    )
    config = PretrainConfig(data="x", masking=masking, seed=seed, run=StreamRun(out=Path("x")), **settings)
    return Inputs(batch, config, seed, shape, groups)


TINY = {
    "patch": 8, "embed_dim": 32, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2
}  # fmt: skip
"""The smallest autoencoder."""


MASKINGS = [*STRATEGIES, *LEARNED]


def of(name: str, **settings) -> Inputs:
    """Inputs of any masking; the model of one that learns is tiny."""
    return inputs_of(name, **settings, **(TINY if name in LEARNED else {}))


def scores_of(inputs: Inputs, progress: float) -> torch.Tensor:
    """By the masking of the config; one that learns has its first weights."""
    name = inputs.config.masking
    if name in STRATEGIES:
        return STRATEGIES[name](inputs, progress)
    rows, cols = inputs.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mae = MAE(size=(8 * rows, 8 * cols), **TINY)
    masking = new_masking(inputs.config, mae, 3)
    assert masking is not None
    return masking.scores(inputs, progress)[0]
