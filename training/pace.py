"""How fast a loop goes, and what share of its time it waits for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Counts images and seconds from its making on; the loop looks at the clock nowhere else but for checkpoints."""

    def __init__(self):
        self._began = self._since = time.monotonic()
        self._images, self._waited = 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside is waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def done(self, images: int) -> None:
        self._images += images

    def figures(self) -> tuple[float, float]:
        """Images a second since the beginning; share of the time since `figures` was last asked that was waiting."""
        now = time.monotonic()
        share = self._waited / max(now - self._since, 1e-9)
        self._since, self._waited = now, 0.0
        return self._images / max(now - self._began, 1e-9), share
