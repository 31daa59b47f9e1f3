"""Signals that ask a loop to end, noted until it can."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Inside, SIGTERM and a first SIGINT are noted and not obeyed; yields the list of them. Outside the main thread,
    where Ray Train runs its workers, Python lets nobody handle signals, and nothing changes."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if signal.SIGINT in noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
