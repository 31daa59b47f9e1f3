"""Files that several threads read at once."""

import os
from pathlib import Path


class OpenFile:
    """An open file, closed when nobody holds it any more: a thread may be reading one that the set lets go."""

    def __init__(self, path: Path):
        self._number = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._number, size, offset)

    @property
    def deleted(self) -> bool:
        return os.fstat(self._number).st_nlink == 0

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)
