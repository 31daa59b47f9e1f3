"""What a section is made of: cases, each with rows to yield and a guess of the seconds it takes."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.rounds import Row

Bars = Mapping[str, tuple[str, float]]
"""Row name to the bar it is held against: ("<=", 1e-5)."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What every section is told."""

    out: Path
    device: Literal["cuda", "cpu"]
    """The CPU's in a rehearsal."""
    rehearse: bool
    """Everything at toy size."""
    photographs: tuple[Path, ...]
    """Folders with truth, for the sections that learn and score parts; default: the drawn images."""
    encoder: str
    """Frozen encoder of those sections."""
    data: str | None
    """Shard set with classes for the masking study; default: the drawn images."""
    cores: int
    ends: float
    """When this section has to be done, by `time.monotonic`."""

    def left(self) -> float:
        """Seconds until then."""
        return self.ends - time.monotonic()

    @property
    def scratch(self) -> Path:
        """For what a case throws away; emptied at the start of a call."""
        return self.out / "scratch"

    def measuring(self, seconds: float) -> float:
        """How long to measure something: `seconds`, or a few calls in a rehearsal."""
        return 0.0 if self.rehearse else seconds


@dataclass(frozen=True, slots=True)
class Case:
    """Something to measure. It is recorded row by row, so that a kill loses only the row under way."""

    name: str
    measure: Callable[[], Iterator[Row]]
    seconds: float = 3.0
    """Not begun with less time left."""


@dataclass(frozen=True, slots=True)
class Section:
    """A file of this folder."""

    name: str
    seconds: float
    """Of MINUTES (config.py); a call with more or fewer minutes gives it its share."""
    cases: Callable[[Bench], list[Case]]
    """Lists the cases, in order of importance; computes nothing, because it is called before the process is forked."""
    bars: Bars


class Unfinished(Exception):
    """A case that has done its share of this call and goes on in the next one; says how far it is."""
