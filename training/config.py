"""Where and how fast a run computes; nothing here changes a result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where the output goes, and on what it is computed. A run may be resumed with other values."""

    out: Path
    """Folder of this run: created if missing, reused if finished, continued if unfinished."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the models run; auto takes cuda, then mps, then cpu."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast precision; auto takes bf16 where the device computes it natively."""
    threads: int = 2
    """Threads that read and decode images."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; the end always writes one."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.checkpoint_minutes < 0:
            raise ValueError(f"checkpoint_minutes must not be negative, got {self.checkpoint_minutes}")
