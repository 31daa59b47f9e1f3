"""What `--parts` means, and what everything that labels images can do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from partlearn.config import TRUTH, ExtractConfig
from partlearn.labelling.baselines import NAMES
from partlearn.labelling.learned import open_token_labeller
from partlearn.labelling.sources import Source, Stored
from partlearn.labelling.stored_labels import Labels
from partlearn.labelling.truth import TruthLabeller, boxes_of, truth_beside
from training.device import pick_device


@runtime_checkable  # for the checks of annotations in tests
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
        """What decides the labels, for plans; with `computed`."""
        ...

    @property
    def computed(self) -> dict[str, str]:
        """Device type and precision that labels are computed with; empty where they depend on neither."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the labels come from, for dataset.json."""
        ...

    def label(self, batch: Sequence[Stored]) -> Labels:
        """The labels of a batch of images."""
        ...


def open_labeller(config: ExtractConfig, source: Source | None = None) -> Labeller:
    """The labeller that `config.parts` or `config.boxes` names, on the device that is here.

    Args:
        source: The images, which the truth needs: its maps are beside them, its boxes have their names.

    Raises:
        ValueError, FileNotFoundError: See `truth_beside`, `boxes_of`, `TruthLabeller` and `open_token_labeller`.
        CheckpointError: See `open_token_labeller`.
    """
    if config.boxes or str(config.parts) == TRUTH:
        if source is None:
            raise ValueError(
                "--parts truth needs the images that its maps are beside, and --boxes those that they are of"
            )
        files = boxes_of(source, config.boxes) if config.boxes else truth_beside(source)
        return TruthLabeller(files, source.names, grid=config.grid or 28)
    return open_token_labeller(
        config.parts,
        encoder=config.encoder,
        grid=config.grid,
        block=config.encoder_block,
        mean=config.encoder_mean,
        std=config.encoder_std,
        num_parts=config.num_parts,
        device=pick_device(config.run.device),
        precision=config.run.precision,
        attention=config.attention,
    )


def folder_of(parts: str | Path) -> Path | None:
    """The run folder that `parts` names; None where it is a name."""
    return None if str(parts) in (*NAMES, TRUTH, "builtin") else Path(parts)
