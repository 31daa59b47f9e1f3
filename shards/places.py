"""Paths as people give them: `~` is a home folder, and an output that cannot be written is found before the work."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

HOME = re.compile(r"(?P<kind>(?:[a-z]+:(?!//)(?:[^=~]*=)?)?)(?P<path>~.*)", re.DOTALL)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def at_home(value: Any) -> Any:
    """`~/x` and `~user/x` written out, also behind the kind of a source: `run:~/x`, `timm:NAME=~/x`.

    Args:
        value: A string, a path, or a tuple of them; anything else comes back as it is.

    Raises:
        ValueError: There is no such home folder.
    """
    if isinstance(value, tuple):
        return tuple(at_home(one) for one in value)
    found = HOME.fullmatch(str(value)) if isinstance(value, (str, Path)) else None
    if not found:
        return value
    path = os.path.expanduser(found["path"])  # noqa: PTH111 (Path's raises where there is none)
    if path.startswith("~"):
        raise ValueError(
            f"{value} begins at {path.partition('/')[0]}, and this machine knows no such home folder; write the whole "
            "path, from / on"
        )
    return type(value)(found["kind"] + path)


def refuse_url(location: str, *, flag: str = "--out") -> None:
    """Results go to folders alone; a `Path` of a URL has lost a slash and is known all the same.

    Raises:
        ValueError: It is a URL.
    """
    if URL.match(location):
        raise ValueError(
            f"{flag} {location} is a URL, and results are written to local folders; write to one, then upload it "
            "with your store's own tool (reading from s3:// and gs:// works)"
        )


def refuse_unwritable(path: Path, *, flag: str = "--out", folder: bool = True) -> None:
    """Nothing is made here; where nothing could be, that is said before the work.

    Args:
        folder: Whether `path` is to be a folder, or else a file.

    Raises:
        ValueError: It is a URL, or begins with an unexpanded `~`; something of the other kind is there or on the way
            there; or nothing can be written there (rights, a read-only or a full disk).
    """
    refuse_url(str(path), flag=flag)
    if str(path).startswith("~"):
        raise ValueError(f"{flag} {path} would be a folder named {path.parts[0]}; write the whole path, from / on")
    if not folder and path.is_dir():
        raise ValueError(f"{flag} {path} is a folder, and a file is written there; name a file in it")
    place = (path if folder else path.parent).absolute()
    there = next(one for one in (place, *place.parents) if os.path.lexists(one))
    if not there.is_dir():
        raise ValueError(f"{flag} {path} needs a folder, and {there} is a file; choose another {flag}")
    try:
        with tempfile.TemporaryFile(dir=there) as probe:  # a real write: a full disk lets files be made and left empty
            probe.write(bytes(4096))
    except OSError as error:
        raise ValueError(
            f"{flag} {path} cannot be written ({there}: {error.strerror}); choose another {flag}"
        ) from None


def only_to_be_read(folder: Path) -> bool:
    """Whether this account may look into a folder and not write there: a colleague's, say."""
    return folder.is_dir() and not os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def lock_of(folder: Path) -> FileLock:
    """The lock of a folder, for one process at a time and for whoever may write there: its mode follows the umask."""
    path = folder / ".lock"
    if not path.exists():
        path.touch()
    return FileLock(path, blocking=False)
