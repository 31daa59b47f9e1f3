"""How busy other processes keep this machine while something is measured, and which cores we measure on."""

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOREIGN = 0.10
"""Cores that others may take before a block is loud."""
STAT = Path("/proc/stat")


class Meter:
    """Wall time of a `with` block, and the cores that others kept busy during it (0 where nobody can tell)."""

    wall = foreign = 0.0

    def __enter__(self) -> "Meter":
        self._before = (busy_of_machine(), _busy_of_us())
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._began
        machine, ours = busy_of_machine(), _busy_of_us()
        if machine is not None and self._before[0] is not None:
            self.foreign = foreign_cores(machine - self._before[0], ours - self._before[1], self.wall)


def foreign_cores(machine_s: float, ours_s: float, wall_s: float) -> float:
    """Cores that were busy, but not with us."""
    return max(0.0, machine_s - ours_s) / wall_s


def busy_of_machine() -> float | None:
    """Seconds that all cores together were busy since they booted; None where there is no /proc/stat."""
    if not STAT.is_file():
        return None
    user, nice, system, _idle, _iowait, *interrupts = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _busy_of_us() -> float:
    """CPU seconds of this process, all threads, and of the children it has waited for; no case leaves any running."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def cores_here() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """This thread, and the threads it starts meanwhile, on `count` cores; nothing happens where that cannot be."""
    if sys.platform != "linux":
        yield
        return
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(ours)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)
