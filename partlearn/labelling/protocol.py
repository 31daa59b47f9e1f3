"""What `--parts` means, and what everything that labels images can do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from encoders.frozen import CPU
from partlearn.config import TRUTH
from partlearn.labelling.baselines import NAMES
from partlearn.labelling.learned import open_token_labeller
from partlearn.labelling.sources import Source, Stored
from partlearn.labelling.stored_labels import Labels
from partlearn.labelling.truth import TruthLabeller


@runtime_checkable
class Labeller(Protocol):
    """Gives images part labels and a foreground rank."""

    grid: int
    """Cells a side."""
    portable: bool
    """Goes to another process as it is; others are opened there, on the device that is there."""

    @property
    def groups(self) -> int:
        """Labels there are: the parts, and the background where there is one."""
        ...

    @property
    def heads(self) -> int:
        """Heads whose attention is stored; 0 where none is."""
        ...

    @property
    def shuffled(self) -> bool:
        """Whether an image has the labels of another, and cannot be labelled alone."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the labels, for plans."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the labels come from, for dataset.json."""
        ...

    def label(self, batch: Sequence[Stored]) -> Labels:
        """The labels of a batch of images."""
        ...


def open_labeller(
    parts: str | Path,
    source: Source | None = None,
    *,
    encoder: str | None = None,
    grid: int | None = None,
    block: int | None = None,
    num_parts: int = 6,
    device: torch.device = CPU,
    precision: str = "auto",
    attention: bool = False,
) -> Labeller:
    """The labeller that `parts` names: `truth`, or what `open_token_labeller` opens.

    Args:
        source: The images, which `truth` needs: its maps are beside them.

    Raises:
        ValueError, FileNotFoundError: See `TruthLabeller` and `open_token_labeller`.
        CheckpointError: See `open_token_labeller`.
    """
    if str(parts) == TRUTH:
        if source is None:
            raise ValueError("--parts truth needs the images that its maps are beside")
        return TruthLabeller(source, grid=grid or 28)
    return open_token_labeller(
        parts,
        encoder=encoder,
        grid=grid,
        block=block,
        num_parts=num_parts,
        device=device,
        precision=precision,
        attention=attention,
    )


def folder_of(parts: str | Path) -> Path | None:
    """The run folder that `parts` names; None where it is a name."""
    return None if str(parts) in (*NAMES, TRUTH, "builtin") else Path(parts)
