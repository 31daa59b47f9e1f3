"""A run folder: config.json, environment.json, metrics.jsonl, checkpoints/, and DONE.json last."""

import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from shards.atomic import read_json, write_json
from shards.places import lock_of, only_to_be_read, refuse_unwritable
from training import distributed
from training.device import pick_device
from training.same_run import raised, refuse_another, told

PACKAGES = ("semmae", "torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "pyarrow", "ray")


class RunError(Exception):
    """A run folder that cannot be opened: in use, or of another config."""


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def git_state(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """Commit and dirt of the checkout this code runs from; nulls outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


class RunFolder:
    """An open run folder; only the main rank writes into it. Use as a context manager."""

    before: dict[str, Any] | None
    """What config.json says of a finished run that is to go on for longer; None for any other, and beside the main
    rank."""

    def __init__(self, path: Path, lock: FileLock | None, *, before: dict[str, Any] | None = None, config: Any = None):
        self.path, self.before = path, before
        self.finished = (path / "DONE.json").is_file() and before is None
        self._lock, self._config = lock, config

    @classmethod
    def open(cls, config: Any, *, raisable: Collection[str] = ()) -> "RunFolder":
        """Open `config.run.out`, making it when missing and continuing it when the config is the same.

        Args:
            raisable: Fields that may be higher than they were when the run finished: it then goes on.

        Raises:
            ValueError: The folder belongs to a run of another config; the differing fields are named. Or it cannot be
                written, and its run is not finished.
            RunError: Another process works in the folder.
        """
        path = Path(config.run.out)
        if not distributed.is_main():
            return cls(path, None)
        if (path / "DONE.json").is_file() and only_to_be_read(path):
            refuse_another(path, read_json(path / "config.json"), config)
            return cls(path, None)
        refuse_unwritable(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_of(path)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(f"{path} is in use by another process; wait for it or choose another --out") from None
        try:
            before = _claim(path, config, raisable)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, before=before, config=config)

    def begin(self) -> None:
        """What was finished and goes on for longer is finished no more; called when nothing can be refused any more."""
        if self.before is not None:
            (self.path / "DONE.json").unlink(missing_ok=True)
            write_json(self.path / "config.json", told(self._config))

    def report(self) -> dict[str, Any]:
        """What the finished run wrote as its last word."""
        return read_json(self.path / "DONE.json")

    def finish(self, report: dict[str, Any]) -> None:
        """Write DONE.json: from now on the run is complete and is reused as it is."""
        if distributed.is_main():
            write_json(self.path / "DONE.json", report)
        self.finished = True

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def opened(
    config: Any, *, check: Callable[[int], None] = lambda ranks: None, raisable: Collection[str] = ()
) -> Iterator[RunFolder]:
    """The run folder of `config` on each of its ranks; both are left on every way out.

    Args:
        check: Refuses, by raising, numbers of ranks that the config does not go with.
        raisable: See `RunFolder.open`.

    Raises:
        ValueError: The ranks cannot share a batch; nothing was written. And see `RunFolder.open`.
    """
    joined = distributed.join(config.run.device)
    try:
        ranks = distributed.world_size()
        if config.batch_size % ranks:
            raise ValueError(f"--batch-size {config.batch_size} cannot be shared by {ranks} ranks; choose a multiple")
        check(ranks)
        with RunFolder.open(config, raisable=raisable) as run:
            distributed.barrier()
            (run.finished,) = distributed.on_any_rank(distributed.is_main() and run.finished)
            if run.finished and distributed.is_main():
                print(f"{run.path} is finished already; its figures are those of then", file=sys.stderr)
            yield run
    finally:
        if joined:
            distributed.leave()


FIRST = ("config.json", "environment.json")
"""What a run writes before it computes anything."""


def untouched(path: Path) -> bool:
    """Whether nothing was computed here: no checkpoint, and no step that was logged.

    So a run that was refused at its start, by a wrong path say, or that ran out of memory in its first step leaves its
    folder to other settings. Ranks that are writing what comes first (`shards.atomic`), or were killed as they did,
    leave no more.
    """
    return all(_says_nothing(entry) for entry in path.iterdir())


def _says_nothing(entry: Path) -> bool:
    if entry.name == "metrics.jsonl":
        return entry.stat().st_size == 0
    if entry.name == "checkpoints":
        return all(one.name.startswith(".") for one in entry.iterdir())
    begun = ("events.out.tfevents.", *(f".{one}." for one in FIRST))
    return entry.name in (".lock", ".metrics.jsonl.partial", *FIRST) or entry.name.startswith(begun)


def _claim(path: Path, config: Any, raisable: Collection[str]) -> dict[str, Any] | None:
    """Write config.json and environment.json, or check that config.json says the same where work was done.

    Returns what config.json says where the run is finished and goes on with a raisable field raised.
    """
    ours, longer = told(config), {}
    theirs = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if theirs and not (untouched(path) and theirs.get("verb") == ours["verb"]):
        goes_on = (path / "DONE.json").is_file() and any((path / "checkpoints").glob("step-*"))
        longer = raised(theirs, ours, raisable) if goes_on else {}
        refuse_another(path, theirs | longer, config, raisable=raisable)
    elif not untouched(path):
        raise ValueError(f"{path} is neither empty nor a run folder (no config.json); choose another --out")
    else:
        write_json(path / "config.json", ours)
    write_json(
        path / "environment.json",
        {
            "command": sys.argv,
            "git": git_state(),
            "versions": package_versions(),
            "machine": platform.platform(),
            "device": str(pick_device(config.run.device)),
        },
    )
    return theirs if longer else None
