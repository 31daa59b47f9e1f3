"""The table of everything measured so far: in words for a terminal, as Markdown, and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.on_gpu.case import Case, Section
from benchmarks.on_gpu.ledger import Ledger, Outcome
from benchmarks.rounds import Row, verdict

COLUMNS = ("what", "value", "unit", "quartiles", "n", "bar", "verdict")
NUMBERS = ("value", "quartiles", "n")


@dataclass(frozen=True, slots=True)
class Reported:
    """A section, its cases, and how each ended."""

    section: Section
    outcomes: list[tuple[Case, Outcome]]
    commit: str
    """Of this call; what an earlier one measured at another is marked."""
    held: bool
    """Whether rows are held against bars: not in a rehearsal."""

    @property
    def bars(self) -> dict[str, tuple[str, float]]:
        return dict(self.section.bars) if self.held else {}


def reported(section: Section, cases: Sequence[Case], ledger: Ledger, *, held: bool) -> Reported:
    outcomes = ledger.outcomes(section.name)
    return Reported(section, [(case, outcomes.get(case.name, Outcome())) for case in cases], ledger.commit, held)


def as_text(heading: str, sections: Sequence[Reported]) -> str:
    """Columns padded to their widest cell."""
    tables = [(one.section.name, _lines(one)) for one in sections]
    rows = [cells for _, lines in tables for cells in (COLUMNS, *lines)]
    widths = [max(len(cells[place]) for cells in rows) for place in range(len(COLUMNS))]
    said = [heading]
    for name, lines in tables:
        said += ["", name.upper(), _padded(COLUMNS, widths), *(_padded(cells, widths) for cells in lines)]
    return "\n".join(said) + "\n"


def as_markdown(heading: str, sections: Sequence[Reported]) -> str:
    """A table a section, under the heading."""
    said = [heading]
    for one in sections:
        said += ["", f"### {one.section.name}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        said += [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in _lines(one)]
    return "\n".join(said) + "\n"


def as_json(machine: dict[str, Any], sections: Sequence[Reported]) -> dict[str, Any]:
    """The machine; every row, its name led by section and case; and how every case ended. JSON has no NaN: null."""
    rows, cases = [], []
    for one in sections:
        for case, outcome in one.outcomes:
            told = {"section": one.section.name, "case": case.name, "state": outcome.state, "why": outcome.why}
            cases.append(told | {"seconds": round(outcome.seconds, 1), "commit": outcome.commit})
            for row in outcome.rows:
                name = f"{one.section.name}/{case.name}/{row.name}"
                figures = {key: None if value != value else value for key, value in row.as_json().items()}
                rows.append(figures | {"name": name, "verdict": verdict(row, one.bars)})
    return {"machine": machine, "rows": rows, "cases": cases}


def _lines(one: Reported) -> list[tuple[str, ...]]:
    """A line a case with its time, or the reason why it has no row; then its rows."""
    lines = []
    for case, outcome in one.outcomes:
        ended = "" if outcome.state == "done" else outcome.state + (f": {outcome.why}" if outcome.why else "")
        if outcome.began and outcome.commit != one.commit:
            ended = f"{ended} at commit {outcome.commit}".strip()
        lines.append((case.name, f"{outcome.seconds:.1f}" if outcome.seconds else "", "s", "", "", "", ended))
        lines += [_cells(row, one) for row in outcome.rows]
    return lines


def _cells(row: Row, one: Reported) -> tuple[str, ...]:
    bar = " ".join(str(part) for part in one.bars.get(row.name, ()))
    between = f"{_figure(row.low)} to {_figure(row.high)}" if row.low < row.high else ""
    return f"  {row.name}", _figure(row.value), row.unit, between, str(row.n), bar, verdict(row, one.bars)


def _figure(value: float) -> str:
    """Four digits that count, without an exponent where people would not use one."""
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.1e}"


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.rjust(width) if name in NUMBERS else cell.ljust(width)
        for name, cell, width in zip(COLUMNS, cells, widths, strict=True)
    )
    return "  ".join(padded).rstrip()
