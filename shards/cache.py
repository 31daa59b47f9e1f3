"""Copies of a slow or remote set's shards on a local disk, made before they are needed, within a stated size."""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from shards import storage
from shards.atomic import write_whole
from shards.errors import ShardError

PIECE = 1 << 20


class Cache:
    """One thread copies the shards of the coming windows; those of past windows go when room is needed.

    A copy is compared with its sha256 and renamed, so that a reader sees a whole one or none. Ranks of one machine
    share the folder: a lock a shard keeps them from copying it twice. Nothing depends on the copies being there: a
    reader that comes too early copies the shard itself.
    """

    def __init__(self, source: str, folder: Path, max_bytes: int):
        self.source, self.max_bytes = source.rstrip("/"), max_bytes
        if not storage.is_remote(source):
            self.source = str(Path(source).absolute())
        self.folder = folder / hashlib.sha256(self.source.encode()).hexdigest()[:16]
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        for name in ("dataset.json", "index.parquet"):
            try:
                theirs = storage.read(f"{self.source}/{name}")
            except FileNotFoundError:
                raise FileNotFoundError(f"no whole shard set at {source}: {name} is missing there") from None
            self._forget_another_set(self.folder / name, theirs)
            write_whole(self.folder / name, theirs)
        self._shards: list[dict[str, Any]] = []
        self._ahead: list[tuple[int, list[str]]] = []
        """Windows copied or to be copied: where each ends, and its shards."""
        self._reached, self._closed = 0, False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failed: Exception | None = None

    def _forget_another_set(self, known: Path, theirs: bytes) -> None:
        """A set may be built again at the same place: copies of the old one go, whose sizes may be the same."""
        if not known.is_file() or known.read_bytes() != theirs:
            for copy in (self.folder / "shards").glob("*.tar"):
                copy.unlink(missing_ok=True)

    def expect(self, shards: list[dict[str, Any]]) -> None:
        """Take the list of shards from dataset.json (names, sizes, digests); sweep away what killed copiers left."""
        self._shards = shards
        for aside in (self.folder / "shards").glob(".*.part"):
            with suppress(Timeout), FileLock(self.folder / "shards" / f"{aside.name[1:-9]}.lock", blocking=False):
                aside.unlink(missing_ok=True)

    def follow(self, windows: Iterator[tuple[int, np.ndarray]], *, window: int, under_way: int) -> None:
        """Begin to copy ahead, window after window; `reached` says how far reading has come.

        Args:
            window: Shards read together; 0 = all of them.
            under_way: Samples that are being read beyond the position reached: batches decoded ahead.

        Raises:
            ValueError: The window being read and those ahead of it that are under way (one at least) do not fit into
                the stated size.
        """
        sizes = sorted((shard["bytes"] for shard in self._shards), reverse=True)
        fewest = sum(sorted(shard["samples"] for shard in self._shards)[:window])
        ahead = max(1, -(-under_way // max(1, fewest))) if window else 1
        needed = sum(sizes[: (1 + ahead) * window]) if window else sum(sizes)
        if needed > self.max_bytes:
            advice = "choose a smaller --window" if window else "shuffle windows of shards, with --window 8, say"
            if ahead > 1:
                advice = f"read smaller batches or more shards at a time: batches under way span {ahead} windows"
            raise ValueError(
                f"caching needs {needed / 1e9:.2f} GB in {self.folder.parent} and may take {self.max_bytes / 1e9:.2f}; "
                f"raise --cache-gb, or {advice}"
            )
        self.close()
        self._ahead, self._reached, self._closed, self._failed = [], 0, False, None
        self._thread = threading.Thread(target=self._copy_ahead, args=(windows, ahead), name="cache", daemon=True)
        self._thread.start()

    def reached(self, position: int) -> None:
        """Reading has come to `position`: shards of the windows before it may go.

        Raises:
            ShardError: Copying ahead has failed; nothing that is missing is waited for silently.
        """
        with self._changed:
            self._reached = position
            self._changed.notify_all()
        if self._failed:
            raise ShardError(f"copying shards from {self.source} failed: {self._failed}") from self._failed

    def local(self, number: int) -> tuple[Path, bool]:
        """The copy of a shard, and whether it was made now, for which others may have been deleted.

        Raises:
            ShardError: What the store gives is not what dataset.json names.
        """
        told = self._shards[number]
        path = self.folder / "shards" / told["name"]
        if _size(path) == told["bytes"]:
            return path, False
        with FileLock(path.with_suffix(".lock")):
            if _size(path) == told["bytes"]:
                return path, False
            with self._changed:
                self._has_room(told)  # made where it can be, not waited for
                path.with_name(_aside(path.name)).touch()  # counts from now on
            self._copy(told, path)
        return path, True

    def close(self) -> None:
        """Stop copying."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
            self._thread = None

    def _copy_ahead(self, windows: Iterable[tuple[int, np.ndarray]], ahead: int) -> None:
        """Copy up to `ahead` windows beyond the one being read."""
        ends = deque([0] * ahead, maxlen=ahead)
        try:
            for end, numbers in windows:
                with self._changed:
                    self._ahead.append((end, [self._shards[number]["name"] for number in numbers]))
                for number in numbers.tolist():
                    with self._changed:
                        self._changed.wait_for(
                            lambda number=number: self._closed or self._has_room(self._shards[number])
                        )
                        if self._closed:
                            return
                    self.local(number)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._reached >= ends[0])
                ends.append(end)
        except Exception as error:  # passed on by `reached`, in the thread that trains
            self._failed = error

    def _has_room(self, coming: dict[str, Any]) -> bool:
        """Delete copies of past windows until `coming` fits beside the others, those under way included; false where
        it does not. The caller holds `_changed`."""
        self._ahead = [(end, names) for end, names in self._ahead if end > self._reached]
        wanted = {name for _, names in self._ahead for name in names}
        sizes = {shard["name"]: shard["bytes"] for shard in self._shards}
        files = set(os.listdir(self.folder / "shards"))
        here = {name for name in sizes if name in files or _aside(name) in files}
        taken = sum(sizes[name] for name in here | {coming["name"]})
        for past in sorted((here & files) - wanted - {coming["name"]}):
            if taken <= self.max_bytes:
                break
            (self.folder / "shards" / past).unlink(missing_ok=True)
            taken -= sizes[past]
        return taken <= self.max_bytes

    def _copy(self, told: dict[str, Any], path: Path) -> None:
        aside, digest = path.with_name(_aside(path.name)), hashlib.sha256()
        try:
            with storage.open_binary(f"{self.source}/shards/{told['name']}") as source, open(aside, "wb") as copy:
                while piece := source.read(PIECE):
                    digest.update(piece)
                    copy.write(piece)
            if digest.hexdigest() != told["sha256"]:
                raise ShardError(
                    f"{self.source}/shards/{told['name']} is damaged: its sha256 is not the one in dataset.json; "
                    "run `verify --repair` where the set was built and upload it again"
                )
            os.replace(aside, path)
        except FileNotFoundError as error:
            aside.unlink(missing_ok=True)
            raise ShardError(f"{self.source}/shards/{told['name']} is missing; upload it again") from error
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def _aside(name: str) -> str:
    """The file a copy is made in: one name a shard, whoever copies holds its lock."""
    return f".{name}.part"


def _size(path: Path) -> int | None:
    """Bytes of a copy; none where another rank has just made room."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
