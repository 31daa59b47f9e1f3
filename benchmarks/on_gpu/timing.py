"""How fast something is on a device that works behind the program's back: blocks between synchronisations."""

import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.rounds import Row

WARM_UP, BLOCKS = 3, 7
"""Calls before a measurement, and its blocks; median and quartiles are theirs."""


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], *, device: str, seconds: float) -> list[float]:
    """Seconds that a call of `work` takes: one figure for each of BLOCKS blocks, which share about `seconds`. Without
    any seconds (a rehearsal), of two calls."""
    if not seconds:
        return [_block(work, 1, device) for _ in range(2)]
    for _ in range(WARM_UP):
        work()
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    calls = max(1, round(seconds / BLOCKS / (time.perf_counter() - began)))
    return [_block(work, calls, device) for _ in range(BLOCKS)]


def _block(work: Callable[[], object], calls: int, device: str) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def rate(name: str, images: int, taken: list[float]) -> Row:
    """Images a second, of calls that do `images` each."""
    return quartiles(name, "images/s", [images / seconds for seconds in taken])


def quartiles(name: str, unit: str, values: list[float]) -> Row:
    """The median, between the quartiles."""
    low, middle, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return Row(name=name, value=middle, unit=unit, n=len(values), low=low, high=high)


def peak_memory(device: str) -> list[Row]:
    """A row of the device's most used memory since the case began; none on a CPU."""
    if device != "cuda":
        return []
    used = torch.cuda.max_memory_allocated() / 1e9
    return [Row(name="peak_memory", value=used, unit="GB", n=1, low=used, high=used)]
