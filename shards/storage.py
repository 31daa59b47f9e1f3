"""Files here and in object stores, read by the same three functions. `s3://` and `gs://` through pyarrow.fs."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pyarrow import NativeFile, fs

WHOLE_FILE = -1


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URI rather than a path."""
    return "://" in str(location)


def open_binary(location: str) -> BinaryIO | NativeFile:
    """A seekable reader.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The store does not answer.
    """
    if not is_remote(location):
        return open(location, "rb")
    store, path = connect(location)
    return store.open_input_file(path)


def read(location: str, offset: int = 0, size: int = WHOLE_FILE) -> bytes:
    """`size` bytes from `offset` on, or all that follow it."""
    with open_binary(location) as file:
        if offset:
            file.seek(offset)
        return file.read() if size == WHOLE_FILE else file.read(size)


def walk(folder: str) -> Iterator[str]:
    """Every file under a remote folder, as URIs.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    store, path = connect(folder)
    scheme = folder.partition("://")[0]
    for found in store.get_file_info(fs.FileSelector(path, recursive=True)):
        if found.type == fs.FileType.File:
            yield f"{scheme}://{found.path}"


def is_file(location: str) -> bool:
    if not is_remote(location):
        return Path(location).is_file()
    store, path = connect(location)
    return store.get_file_info(path).type == fs.FileType.File


def connect(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path in it.

    Raises:
        ValueError: pyarrow knows no such store.
    """
    scheme, _, path = location.partition("://")  # not urlsplit: names of images may hold # and ?
    return _store(scheme, path.partition("/")[0]), path.rstrip("/")


@functools.cache
def _store(scheme: str, bucket: str) -> fs.FileSystem:
    """One connection a bucket and process. S3 takes its credentials, region and AWS_ENDPOINT_URL from the
    environment, as the AWS tools do (pyarrow alone ignores the last)."""
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint or region:
            return fs.S3FileSystem(endpoint_override=endpoint, region=region)
    try:
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
    except (ValueError, OSError) as error:
        raise ValueError(f"{scheme}://{bucket} cannot be opened ({error}); expected s3://, gs:// or a path") from None
