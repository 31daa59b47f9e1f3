"""What was measured so far: `ledger.jsonl`, a line an event, so that any kill leaves the rows before it."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.on_gpu.case import Case
from benchmarks.rounds import Row

State = Literal["not reached", "cut", "done", "does not fit", "failed", "unfinished"]
FINAL = ("done", "does not fit")


@dataclass(slots=True)
class Outcome:
    """Of a case: how its last try ended, and that try's rows."""

    state: State = "not reached"
    why: str = ""
    rows: list[Row] = field(default_factory=list)
    began: float = 0.0
    """Seconds since 1970; 0 of a case never begun."""
    seconds: float = 0.0
    commit: str = ""

    @property
    def final(self) -> bool:
        return self.state in FINAL


class Ledger:
    """Written by one process at a time: the one that measures."""

    def __init__(self, path: Path, commit: str):
        self.path, self.commit = path, commit

    def begin(self, section: str, case: str) -> None:
        """From here on what an earlier try of this case left no longer counts."""
        self._write(section, case, event="begin", time=time.time(), commit=self.commit)

    def row(self, section: str, case: str, row: Row) -> None:
        self._write(section, case, event="row", row=row.as_json())

    def end(self, section: str, case: str, state: State, why: str = "") -> None:
        self._write(section, case, event="end", state=state, why=why, time=time.time())

    def outcomes(self, section: str) -> dict[str, Outcome]:
        """By name of the case; a case that was begun and never ended was cut."""
        found: dict[str, Outcome] = {}
        for line in self._lines():
            if line["section"] != section:
                continue
            if line["event"] == "begin":
                found[line["case"]] = Outcome("cut", began=line["time"], commit=line["commit"])
                continue
            outcome = found[line["case"]]
            if line["event"] == "row":
                outcome.rows.append(Row(**line["row"]))
            else:
                outcome.state, outcome.why = line["state"], line["why"]
                outcome.seconds = line["time"] - outcome.began
        return found

    def waiting(self, section: str, cases: list[Case]) -> list[Case]:
        """The cases still to be measured: those never tried, in their order, then the others, longest wait first."""
        outcomes = self.outcomes(section)
        left = [case for case in cases if not outcomes.get(case.name, Outcome()).final]
        return sorted(left, key=lambda case: outcomes.get(case.name, Outcome()).began)

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines; one that a kill cut short has no newline."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def _write(self, section: str, case: str, **event: Any) -> None:
        with open(self.path, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps({"section": section, "case": case} | event).encode() + b"\n")
