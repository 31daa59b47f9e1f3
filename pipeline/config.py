"""What the verbs of the pipeline itself take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """A check of a shard set."""

    data: Path
    """Shard set: a folder with dataset.json."""
    level: Literal["fast", "hash", "deep"] = "fast"
    """fast: files and sizes; hash: every digest; deep: every member, checksum, label and picture."""
    json: Path | None = None
    """Write the faults there as a JSON list of rows."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """The whole job, small enough for a laptop without a GPU."""

    images: str | None = None
    """Pictures; without them, a procedural set of creatures with true parts is drawn."""
    out: Path = Path("runs/demo")
    """Everything goes there; a second call reuses what is finished."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the models run."""
    seed: int = 0
    """The one seed of everything."""
    debug: bool = False
    """Show the traceback of an error."""
