"""Where and how fast a run computes; nothing here changes a result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where a run's output goes and which machine does it. Resuming under another RunConfig is fine."""

    out: Path
    """Folder of this run: made when missing, reused when finished, continued when half done."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the models run; auto takes cuda, then mps, then cpu."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; auto takes bf16 where the device computes it fast."""
    threads: int = 2
    """Threads that read and decode images."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; one is always written at the end."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.checkpoint_minutes < 0:
            raise ValueError(f"checkpoint_minutes must not be negative, got {self.checkpoint_minutes}")
