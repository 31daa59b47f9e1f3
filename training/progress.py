"""How far a loop is and how long it will still take: one living line on a terminal, a line now and then in a log."""

import sys
import time

from training import distributed

TERMINAL_S = 0.2
LOG_S = 10.0


class Progress:
    """Counts to `total` on stderr. Silent for the first two seconds, on every rank but the first, at the end of
    anything shorter than that, and where there is nothing to count."""

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0):
        self.total, self.what, self.unit = total, what, unit
        self.done = self._first = done
        self._began = time.monotonic()
        self._printed = self._began + 2.0 - TERMINAL_S
        self._living = sys.stderr.isatty()
        self._silent = not distributed.is_main()

    def advance(self, count: int = 1, /, **shown: float) -> None:
        """`count` more are done; `shown` are figures worth seeing beside them."""
        self.done += count
        now = time.monotonic()
        if now - self._printed >= (TERMINAL_S if self._living else LOG_S):
            self._print(now, shown)

    def close(self, **shown: float) -> None:
        now = time.monotonic()
        if self.total and now - self._began >= 2.0:
            self._print(now, shown)
            if self._living and not self._silent:
                print(file=sys.stderr)

    def _print(self, now: float, shown: dict[str, float]) -> None:
        self._printed = now
        if self._silent:
            return
        elapsed = now - self._began
        rate = (self.done - self._first) / elapsed
        left = f", {duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        figures = "".join(f"  {name} {value:{'.4g' if value < 1000 else ',.0f'}}" for name, value in shown.items())
        speed = f"{rate:.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s"
        line = (
            f"{self.what}  {self.done:,}/{self.total:,} {self.unit}  {speed}, {duration(elapsed)} so far{left}{figures}"
        )
        if self._living:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 10 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
