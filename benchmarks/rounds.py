"""Blocks of work, interleaved round by round, and what may be said of them on a machine that others use too.

A ratio is taken inside a round, so that what slows both of its blocks cancels. That is not enough: another job costs
some kinds of work more than others. So a block during which others took more than a tenth of a core is not counted, and
below `ENOUGH` quiet rounds a row is called noisy.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quiet import FOREIGN, Meter, busy_of_machine, on_cores
from training.progress import Progress

BLOCK_S = 0.7
ENOUGH, PLENTY = 12, 20


@dataclass(frozen=True, slots=True)
class Case:
    """Something to measure: `run(seconds)` works for about that long and returns how many images (or calls) it did."""

    name: str
    run: Callable[[float], int]
    cores: int = 1
    unit: str = "images/s"
    """images/s, or s: seconds a call."""


@dataclass(frozen=True, slots=True)
class Block:
    """One measured figure, and the cores that other processes kept busy meanwhile."""

    value: float
    foreign: float

    @property
    def quiet(self) -> bool:
        return self.foreign <= FOREIGN


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Median and quartiles of `n` quiet blocks."""

    name: str
    value: float
    unit: str
    n: int
    low: float
    high: float
    noisy: bool = False
    """Fewer than `ENOUGH` quiet blocks: the figures are leads, not results."""

    def as_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return fields if self.noisy else {name: fields[name] for name in fields if name != "noisy"}


@dataclass(frozen=True, slots=True)
class Report:
    """What a benchmark found."""

    rows: list[Row]
    bars: Mapping[str, tuple[str, float]]
    """Row name to the bar it is held against: (">=", 0.85)."""
    caption: str
    """What was run on what, in words."""


def verdict(row: Row, bars: Mapping[str, tuple[str, float]]) -> str:
    """Whether `row` keeps its bar; nothing for a row without one, and no verdict on a noisy one."""
    if row.noisy:
        return "noisy"
    if row.name not in bars:
        return ""
    relation, bar = bars[row.name]
    return "holds" if (row.value >= bar if relation == ">=" else row.value <= bar) else "fails"


def summary(name: str, unit: str, blocks: Sequence[Block]) -> Row:
    """The row of a case. Without a single quiet block its figures are of the loud ones, and n is 0."""
    quiet = [block.value for block in blocks if block.quiet]
    low, middle, high = np.percentile(quiet or [block.value for block in blocks], [25, 50, 75])
    return Row(
        name=name,
        value=float(middle),
        unit=unit,
        n=len(quiet),
        low=float(low),
        high=float(high),
        noisy=len(quiet) < ENOUGH,
    )


def ratios(over: Sequence[Block], under: Sequence[Block]) -> list[Block]:
    """Round by round, one figure over the other; quiet where both are."""
    return [Block(a.value / b.value, max(a.foreign, b.foreign)) for a, b in zip(over, under, strict=True)]


def exact(name: str, value: float, unit: str, n: int) -> Row:
    """A row that was counted over `n` things and not timed."""
    return Row(name=name, value=value, unit=unit, n=n, low=value, high=value)


def interleaved(
    cases: Sequence[Case], *, pairs: Sequence[tuple[str, str]], minutes: float, what: str, block_s: float = BLOCK_S
) -> dict[str, list[Block]]:
    """The blocks of every case; those at the same place in two lists are of the same round.

    Each round runs every case once, in a shuffled order; the first is thrown away. Ends when every pair has `PLENTY`
    quiet rounds, or after `minutes`, but not before one round is measured.
    """
    ends = time.monotonic() + 60 * minutes
    shuffler = random.Random(0)
    blocks: dict[str, list[Block]] = {case.name: [] for case in cases}
    progress, rounds, quiet = Progress(PLENTY, what, "quiet rounds"), 0, 0
    while not rounds or (quiet < PLENTY and time.monotonic() < ends):
        for warm_up in (True, False) if not rounds else (False,):
            for case in shuffler.sample(cases, len(cases)):
                block = measured(case, block_s)
                if not warm_up:
                    blocks[case.name].append(block)
        rounds += 1
        now = min(sum(block.quiet for block in ratios(blocks[over], blocks[under])) for over, under in pairs)
        progress.advance(now - quiet, rounds=rounds, stops_in_min=max(0.0, ends - time.monotonic()) / 60)
        quiet = now
    progress.close(rounds=rounds)
    return blocks


def repeated(call: Callable[[], object], images: int) -> Callable[[float], int]:
    """Calls of so many images each, one after another for about as long as is asked for; once at least."""

    def run(seconds: float) -> int:
        ends, done = time.monotonic() + seconds, 0
        while not done or time.monotonic() < ends:
            call()
            done += images
        return done

    return run


def measured(case: Case, seconds: float) -> Block:
    """One block of `case`, on its own cores."""
    with on_cores(case.cores), Meter() as meter:
        done = case.run(seconds)
    return Block(done / meter.wall if case.unit == "images/s" else meter.wall / done, meter.foreign)


def gate_in_words() -> str:
    """For the caption: what was done about other processes."""
    if busy_of_machine() is None:
        return "No /proc/stat here: nobody looked whether other processes disturbed it."
    return (
        f"Blocks during which other processes took more than {FOREIGN:.0%} of a core are not counted; "
        f"noisy: fewer than {ENOUGH} quiet ones."
    )
