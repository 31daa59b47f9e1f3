"""Images in, part labels and foreground ranks out: what extraction stores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from encoders.frozen import CPU, Encoder, Tokens
from encoders.load import load_encoder
from partlearn.foreground import confidence
from partlearn.labelling.baselines import NAMES, Baseline
from partlearn.labelling.sources import Stored
from partlearn.labelling.stored_labels import Labels
from partlearn.learner import PartLearner, load_learner
from training.checkpoint import CheckpointError
from training.device import precision_on


class TokenLabeller:
    """A frozen encoder, and what labels its tokens: a part learner, or a baseline.

    Args:
        sha256: Of the learner's shape and weights, or of the baseline's rule.
        attention: Store the class attention of every head too.
    """

    portable = False

    def __init__(self, encoder: Encoder, learner: PartLearner | Baseline, sha256: str, *, attention: bool = False):
        self.encoder, self.learner, self.sha256, self.attention = encoder, learner, sha256, attention
        self.grid, self.groups = learner.shape.grid, learner.shape.groups

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the labels, for plans."""
        encoder = self.encoder.description
        return {
            "encoder_sha256": encoder["weights_sha256"],
            "encoder_block": encoder["block"],
            "encoder_mean": encoder["mean"],
            "encoder_std": encoder["std"],
            "learner_sha256": self.sha256,
        }

    def describe(self) -> dict[str, Any]:
        """What the labels come from, for dataset.json."""
        return {
            "encoder": self.encoder.description,
            "learner_sha256": self.sha256,
            "parts": self.learner.shape.parts,
            **(self.learner.describe() if isinstance(self.learner, Baseline) else {}),
            **self.computed,
        }

    @property
    def computed(self) -> dict[str, str]:
        """Device type and precision, which decide labels too."""
        device = self.encoder.device
        return {"device": device.type, "precision": precision_on(device, self.encoder.precision)}

    @property
    def shuffled(self) -> bool:
        """Whether an image has the labels of another, and cannot be labelled alone."""
        return isinstance(self.learner, Baseline) and self.learner.shuffled

    @property
    def heads(self) -> int:
        """Heads whose attention is stored; 0 where none is."""
        return self.encoder.heads if self.attention else 0

    def label(self, batch: Sequence[Stored]) -> Labels:
        """Labels of images as a shard holds them."""
        return self(np.stack([stored.pixels for stored in batch]))

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
        attn = peaks = None
        if self.attention:
            peaks = labelled.class_attention.amax(dim=-1).cpu().numpy()
            attn = attention_bytes(labelled.class_attention).cpu().numpy().reshape(*shape[:1], -1, *shape[1:])
        return Labels(
            parts.cpu().numpy().astype(np.uint8).reshape(shape),
            rank.cpu().numpy().astype(np.uint16).reshape(shape),
            attn,
            peaks,
            (100 * confidence(labelled.patch_tokens, rank)).round().byte().cpu().numpy(),
        )


def attention_bytes(attention: Float[Tensor, "batch heads patches"]) -> UInt8[Tensor, "batch heads patches"]:
    """Each head's attention as a share of its peak, 255 = all of it; 0 where it attends to nothing."""
    peaks = attention.amax(dim=-1, keepdim=True)
    return (255 * (attention / peaks.masked_fill(peaks == 0, 1))).round().byte()


def open_token_labeller(
    parts: str | Path,
    *,
    encoder: str | None = None,
    grid: int | None = None,
    block: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_parts: int | None = None,
    device: torch.device = CPU,
    precision: str = "auto",
    attention: bool = False,
) -> TokenLabeller:
    """The labeller of a part learner's run folder, of `builtin`, or of a baseline by its name.

    Args:
        encoder: Source of the encoder. Default: the one the parts were learned on; a baseline needs one.
        grid, block, num_parts: Of a baseline: cells a side (28), the block whose tokens are read, parts (6).
        mean, std: Normalisation of the encoder's pixels. Default: the one the parts were learned with; for a baseline,
            what the weights say.

    Raises:
        FileNotFoundError: There are no such parts.
        ValueError: The grid, the block, the normalisation or the number of parts is not the one that was learned, or a
            baseline lacks its encoder.
        CheckpointError: Weights are missing, torn, or have changed since.
    """
    if str(parts) in NAMES:
        if encoder is None:
            raise ValueError(f"the baseline {parts} needs an --encoder, such as --encoder builtin")
        frozen = load_encoder(
            encoder, grid=grid or 28, block=block, mean=mean, std=std, device=device, precision=precision
        )
        name: Any = str(parts)
        baseline = Baseline(name, frozen, parts=num_parts or 6)
        return TokenLabeller(frozen, baseline, baseline.sha256, attention=attention)
    if str(parts) != "builtin" and not Path(parts).exists():
        raise FileNotFoundError(
            f"no parts at {parts}: expected a run folder of learn-parts, builtin, a baseline ({', '.join(NAMES)}), or "
            "for extract also truth (the part maps beside the images)"
        )
    learner, described, sha256 = load_learner(Path(parts))
    if grid not in (None, learner.shape.grid):
        raise ValueError(f"--grid {grid} was asked for, but {parts} was learned on {learner.shape.grid}")
    if block not in (None, described["block"]):
        raise ValueError(f"--encoder-block {block} was asked for, but {parts} reads {described['block']}")
    for flag, asked, learned in (("mean", mean, described["mean"]), ("std", std, described["std"])):
        if asked is not None and list(asked) != list(learned):
            raise ValueError(f"--encoder-{flag} {tuple(asked)} was asked for, but {parts} was learned with {learned}")
    if num_parts not in (None, learner.shape.parts):
        raise ValueError(
            f"--num-parts {num_parts} was asked for, but {parts} has {learner.shape.parts} parts; learn others with "
            "learn-parts --num-parts"
        )
    source = encoder or described["source"]
    frozen = load_encoder(
        source,
        grid=learner.shape.grid,
        block=described["block"],
        mean=described["mean"],
        std=described["std"],
        device=device,
        precision=precision,
    )
    if frozen.fingerprint != described["weights_sha256"]:
        raise CheckpointError(
            f"the weights of {source} are not those that {parts} was learned on; pass the same encoder, "
            "or learn the parts again"
        )
    return TokenLabeller(frozen, learner.to(device), sha256, attention=attention)
