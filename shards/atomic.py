"""A file is written whole or not at all."""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """Write aside, fsync, rename, fsync the folder: a reader sees the old file or the new one, never a part.

    An OSError (a full disk, say) passes on and leaves neither the new file nor the one aside.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Delete what killed writers left aside in `folder`; only for whoever is its one writer."""
    for torn in folder.glob(".*." + "[0-9a-f]" * 32):
        torn.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """`json_bytes`, whole or not at all."""
    write_whole(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Sorted, indented JSON: the same bytes for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The JSON in `path`.

    Raises:
        ValueError: It is none.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}); delete it and run the same command again") from None


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of the canonical JSON: sorted keys, no spaces."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
