"""Sections that misbehave, run as `benchmarks/on_gpu/measure.py` runs the real ones.

python stub_sections.py OUT [--real]      --real: the real sections list their cases first, and must touch no GPU
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.on_gpu.case import Bench, Case, Section, Unfinished
from benchmarks.on_gpu.ledger import Ledger
from benchmarks.on_gpu.run import run_section
from benchmarks.rounds import exact

OUT = Path(sys.argv[1])


def fine():
    yield exact("one", 1.0, "things", 1)


def breaks():
    yield exact("before", 1.0, "things", 1)
    raise ValueError("it broke\non two lines")


def is_too_large():
    yield exact("fits", 1.0, "things", 1)
    raise torch.OutOfMemoryError("tried to allocate 97 GB")


def is_too_large_for_cublas():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
    yield


def dies():
    yield exact("last words", 1.0, "things", 1)
    os.kill(os.getpid(), signal.SIGSEGV)


def goes_on():
    yield exact("stretch", 1.0, "things", 1)
    raise Unfinished("1 of 4")


def hangs():
    with (OUT / "hanging").open("a") as file:
        file.write("begun\n")
    child = subprocess.Popen(["sleep", "300"])
    (OUT / "child").write_text(str(child.pid))
    time.sleep(300)
    yield exact("never", 1.0, "things", 1)


CASES = {
    "troubled": [
        Case("breaks", breaks, 0),
        Case("is too large", is_too_large, 0),
        Case("is too large for cuBLAS", is_too_large_for_cublas, 0),
        Case("dies", dies, 0),
        Case("goes on", goes_on, 0),
        Case("fine", fine, 0),
        Case("takes long", fine, 1000),
    ],
    "hanging": [Case("hangs", hangs, 0), Case("fine", fine, 0)],
    "last": [Case("fine", fine, 0)],
}


def bench(seconds: float) -> Bench:
    return Bench(OUT, "cpu", True, (), "builtin", None, 2, time.monotonic() + seconds)


def list_the_real_ones() -> None:
    torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse
    from benchmarks.on_gpu.measure import SECTIONS

    assert all(section.cases(bench(0)) for section in SECTIONS)


def refuse(*_: object) -> None:
    raise AssertionError("the GPU was touched before the fork")


if "--real" in sys.argv:
    list_the_real_ones()
for name, cases in CASES.items():
    section = Section(name, 1.0, lambda bench, cases=cases: cases, {})
    run_section(section, bench(4.0), Ledger(OUT / "ledger.jsonl", "commit"))
