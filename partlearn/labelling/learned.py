"""Images in, part labels and foreground ranks out: what extraction stores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8, UInt16

from encoders.frozen import CPU, Tokens
from encoders.load import load_encoder
from partlearn.foreground import confidence
from partlearn.labelling.baselines import NAMES, Baseline
from partlearn.learner import PartLearner, load_learner
from training.checkpoint import CheckpointError
from training.device import computes_bf16


@dataclass(frozen=True, slots=True)
class Labels:
    """What is stored of a batch of images."""

    parts: UInt8[np.ndarray, "batch rows cols"]
    fgrank: UInt16[np.ndarray, "batch rows cols"]
    """0 = most likely foreground."""
    attn: UInt8[np.ndarray, "batch heads rows cols"] | None
    """Class attention of each head, scaled so that its most attended cell is 255; where it was asked for."""
    confidence: UInt8[np.ndarray, " batch"]
    """That there is an object, in hundredths; see `foreground.confidence`. Of shuffled labels, in the image that they
    are of."""


class Labeller:
    """A frozen encoder and the part learner that was trained on it, or a baseline on any encoder.

    Args:
        parts: Run folder of a part learner, `builtin` (the one that comes with the project), or the name of a baseline
            (`partlearn/labelling/baselines.py`).
        encoder: Source of the encoder; the learner's own unless told. A baseline needs one.
        grid, block, num_parts: Of a baseline: cells a side (28), the block whose tokens are read, parts.

    Raises:
        ValueError: The grid or the encoder is not the one the parts were learned on, or a baseline lacks its encoder.
        CheckpointError: Weights are missing, torn, or have changed since.
    """

    def __init__(
        self,
        parts: str | Path,
        *,
        encoder: str | None = None,
        grid: int | None = None,
        block: int | None = None,
        num_parts: int = 6,
        device: torch.device = CPU,
        precision: str = "auto",
        attention: bool = False,
    ):
        self.attention = attention
        options: dict[str, Any] = {"device": device, "precision": precision}
        self.learner: PartLearner | Baseline
        if str(parts) in NAMES:
            if encoder is None:
                raise ValueError(f"the baseline {parts} needs an --encoder")
            self.encoder = load_encoder(encoder, grid=grid or 28, block=block, **options)
            name: Any = str(parts)
            self.learner = Baseline(name, self.encoder, parts=num_parts)
            self.sha256 = self.learner.sha256
        else:
            learner, described, self.sha256 = load_learner(Path(parts))
            self.learner = learner.to(device)
            if grid not in (None, learner.shape.grid):
                raise ValueError(f"--grid {grid} was asked for, but {parts} was learned on {learner.shape.grid}")
            if block not in (None, described["block"]):
                raise ValueError(f"--encoder-block {block} was asked for, but {parts} reads {described['block']}")
            source = encoder or described["source"]
            self.encoder = load_encoder(source, grid=learner.shape.grid, block=described["block"], **options)
            if self.encoder.fingerprint != described["weights_sha256"]:
                raise CheckpointError(
                    f"the weights of {source} are not those that {parts} was learned on; pass the same encoder, "
                    "or learn the parts again"
                )
        self.grid, self.groups = self.learner.shape.grid, self.learner.shape.groups

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the labels, for plans."""
        encoder = self.encoder.description
        return {
            "encoder_sha256": encoder["weights_sha256"],
            "encoder_block": encoder["block"],
            "learner_sha256": self.sha256,
        }

    def describe(self) -> dict[str, Any]:
        """What the labels come from, for dataset.json."""
        device, precision = self.encoder.device, self.encoder.precision
        if precision == "auto":
            precision = "bf16" if computes_bf16(device) else "fp32"
        return {
            "encoder": self.encoder.description,
            "learner_sha256": self.sha256,
            "parts": self.learner.shape.parts,
            **(self.learner.describe() if isinstance(self.learner, Baseline) else {}),
            "device": device.type,
            "precision": precision,
        }

    @property
    def shuffled(self) -> bool:
        """Whether an image has the labels of another, and cannot be labelled alone."""
        return isinstance(self.learner, Baseline) and self.learner.shuffled

    @property
    def heads(self) -> int:
        """Heads whose attention is stored; 0 where none is."""
        return self.encoder.heads if self.attention else 0

    def __call__(self, images: UInt8[np.ndarray, "batch height width 3"]) -> Labels:
        """Part of each cell, and its rank in foreground; see `of`."""
        return self.of(self.encoder(torch.from_numpy(images)))

    def of(self, tokens: Tokens) -> Labels:
        """The labels of images that the encoder has read already.

        Raises:
            FloatingPointError: The encoder's tokens are not finite: any labels of them would look plausible.
        """
        if not tokens.block_tokens.isfinite().all():
            raise FloatingPointError(
                f"{self.encoder.description['source']} gives tokens that are not finite; try --precision fp32"
            )
        parts, rank = self.learner.label(tokens)
        labelled = self.learner.labelled(tokens) if isinstance(self.learner, Baseline) else tokens
        shape = (len(parts), self.grid, self.grid)
        attn = None
        if self.attention:
            share = tokens.class_attention / tokens.class_attention.amax(dim=-1, keepdim=True)
            attn = (255 * share).round().byte().cpu().numpy().reshape(len(parts), -1, self.grid, self.grid)
        return Labels(
            parts.cpu().numpy().astype(np.uint8).reshape(shape),
            rank.cpu().numpy().astype(np.uint16).reshape(shape),
            attn,
            (100 * confidence(labelled.patch_tokens, rank)).round().byte().cpu().numpy(),
        )
