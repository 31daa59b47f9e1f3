"""What `benchmarks/gpu.py` is asked for."""

from dataclasses import dataclass
from pathlib import Path

MINUTES = 8.4
"""Imports come on top: all ends within nine."""


class BenchError(Exception):
    """Something could not be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuConfig:
    """What is measured, and for how long."""

    out: Path = Path("runs/gpu")
    """Where figures go as they come, and gpu.json and gpu.md; a second call goes on with what is missing."""
    photographs: tuple[Path, ...] = ()
    """Folders with truth (images/ beside labels/ or masks/): parts are learned and scored there. Default: drawings."""
    encoder: str | None = None
    """Frozen encoder of those parts. Default: the one that comes with the project."""
    data: str | None = None
    """Shard set with classes for the masking study. Default: drawings."""
    minutes: float = MINUTES
    """Time for everything; a section has its share of it, the study what is left."""
    json: Path | None = None
    """Write the rows there as a JSON list too."""
    rehearse: bool = False
    """Run everything at toy size, on a CPU."""
    commit: str | None = None
    """Commit to name where the checkout has no git."""

    def __post_init__(self):
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be above 0, got {self.minutes}")
        if self.data and not (Path(self.data) / "dataset.json").is_file():
            raise FileNotFoundError(f"--data {self.data} is no finished shard set: it has no dataset.json")
        for folder in self.photographs:
            if not (folder / "images").is_dir() or not any((folder / truth).is_dir() for truth in ("labels", "masks")):
                raise FileNotFoundError(f"--photographs {folder} needs images/ beside labels/ or masks/")
        names = ["/".join(folder.absolute().parts[-2:]) for folder in self.photographs]
        if len(set(names)) < len(names):
            raise ValueError(f"--photographs must differ in the last two parts of their paths, got {', '.join(names)}")
