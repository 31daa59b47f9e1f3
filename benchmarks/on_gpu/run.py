"""Sections, each in a process of its own that is killed when its time is over: what one loses, the others keep.

The process is forked from one that has imported everything and touched no GPU, so a section costs no second start,
and a kernel that hangs, a compiler that takes too long or a spoilt CUDA context ends with it.
"""

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.on_gpu.case import Bench, Case, Section, Unfinished
from benchmarks.on_gpu.ledger import Ledger, State

SPOILT = 3
"""Exit status of a section whose device answers no more; the rest of its cases get a new process."""
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
"""What errors of the memory say that are no OutOfMemoryError: those of the driver, cuBLAS and the compiler."""
LEAST_S = 1.0
"""A section is not begun with less time left."""
GRACE_S = 1.0
"""A section that does not come to its end by itself is killed so long after it."""


def run_section(section: Section, bench: Bench, ledger: Ledger) -> None:
    """Measure the cases of `section` that have no final row yet, until `bench.ends`."""
    tried, since = set[str](), time.time()
    while bench.left() >= LEAST_S:
        waiting = [case for case in ledger.waiting(section.name, section.cases(bench)) if case.name not in tried]
        if not waiting:
            return
        status = in_a_process(partial(run_cases, section, waiting, bench, ledger), seconds=bench.left() + GRACE_S)
        if status in (0, None):
            return
        begun = {name: one for name, one in ledger.outcomes(section.name).items() if one.began >= since}
        for name, outcome in begun.items():
            if outcome.state == "cut":
                ledger.end(section.name, name, "failed", f"its process ended with status {status}")
        if not begun:  # it died before its first case, and would again
            return
        tried |= set(begun)


def run_cases(section: Section, cases: list[Case], bench: Bench, ledger: Ledger) -> None:
    """One case after the other; each one's error is its own row's reason."""
    for case in cases:
        if bench.left() < case.seconds:
            continue
        ledger.begin(section.name, case.name)
        state, why = _measured(section, case, ledger)
        ledger.end(section.name, case.name, state, why)
        _say(f"{section.name}  {case.name}: {state}{f' ({why})' if why else ''}, {bench.left():.0f} s left")
        _release(bench.device)


def _measured(section: Section, case: Case, ledger: Ledger) -> tuple[State, str]:
    try:
        for row in case.measure():
            ledger.row(section.name, case.name, row)
            _say(f"{section.name}  {case.name}  {row.name} {row.value:,.5g} {row.unit}")
    except torch.OutOfMemoryError as error:
        return "does not fit", _first_line(error)
    except Unfinished as progress:
        return "unfinished", str(progress)
    except Exception as error:  # whatever it is, the other cases are to be measured; the table says it
        if any(words in str(error) for words in OUT_OF_MEMORY):
            return "does not fit", _first_line(error)
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {_first_line(error)}"
    return "done", ""


def _release(device: str) -> None:
    """Give the case's memory back; a device that cannot even do that is of no more use to this process."""
    gc.collect()
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError as error:
        _say(f"the device answers no more ({_first_line(error)}); going on in a new process")
        sys.stderr.flush()
        os._exit(SPOILT)


def in_a_process(work: Callable[[], None], *, seconds: float) -> int | None:
    """Run `work` in a forked process and return its exit status; after `seconds` it is killed, with all that it
    started, and the answer is None. A signal that ended it is negative, as in `subprocess`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_the_child(work, seconds)
    ends = time.monotonic() + seconds
    try:
        while time.monotonic() < ends:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return None
    finally:
        if pid:
            os.killpg(pid, signal.SIGKILL)
            _await_the_end(pid)


def _await_the_end(pid: int) -> None:
    """Of a killed process; one that hangs in a driver cannot be waited for, and must not cost the sections after it."""
    ends = time.monotonic() + 10
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > ends:
            _say(f"process {pid} was killed and does not end; going on without it")
            return
        time.sleep(0.05)


def _be_the_child(work: Callable[[], None], seconds: float) -> None:
    """Never returns: what is above in the stack is the parent's."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_S)  # where the parent was killed, the alarm ends this process
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
