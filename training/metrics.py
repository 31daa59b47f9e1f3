"""Numbers of a run: one JSON line a step, and the same as TensorBoard events where tensorboard is installed."""

import json
import os
from pathlib import Path

from training import distributed

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # a machine with its own stack: metrics.jsonl holds the same numbers
    SummaryWriter = None


class Metrics:
    """Appends to `run/metrics.jsonl`; lines at or after `step`, left by a killed run, are cut first."""

    def __init__(self, run: Path, *, step: int):
        self._file, self._board = None, None
        if not distributed.is_main():
            return
        path = run / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] < step]
        aside = path.with_name(".metrics.jsonl.partial")
        aside.write_text("".join(kept))
        os.replace(aside, path)
        self._file = open(path, "a")  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(run, purge_step=step) if SummaryWriter else None

    def log(self, step: int, **numbers: float) -> None:
        """One line: the step and its numbers."""
        if self._file is None:
            return
        plain = {name: float(value) for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step} | plain) + "\n")
        self._file.flush()
        for name, value in plain.items():
            if self._board:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board:
            self._board.close()


def read_metrics(run: Path) -> list[dict]:
    """The logged lines of a run, oldest first."""
    return [json.loads(line) for line in _lines(run / "metrics.jsonl")]


def last_figures(run: Path, *, step: int) -> dict[str, float]:
    """What was last logged before `step`: what a run that goes on from there would still know; nothing at its start."""
    before = [line for line in read_metrics(run) if line["step"] < step]
    return {name: value for name, value in before[-1].items() if name != "step"} if before else {}


def _lines(path: Path) -> list[str]:
    """Whole lines of a log; a line cut by a kill has no newline and is left out."""
    if not path.is_file():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
