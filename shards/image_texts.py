"""The images that a text file lists."""

import codecs
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from shards import storage
from shards.formats import SUFFIXES, suffix_of
from shards.found import Found, Listing
from shards.places import at_home

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")


def list_text(source: str, listing: Listing) -> None:
    """Take the images in a text file: a path or URI a line, and perhaps its class after a tab, a comma or a blank.

    A path may hold blanks and commas: it ends where a file is found. Blank lines and a byte order mark are skipped.

    Raises:
        FileNotFoundError: A line names no file.
        ValueError: It is no text, or names a file twice.
    """
    folder = source.rpartition("/")[0]
    lines_of: dict[str, int] = {}
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        name, label, location = _read(line.strip(), folder)
        if not location:
            raise FileNotFoundError(f"{source} line {number} names {name}, which is no file")
        whole = location if storage.is_remote(location) else os.path.normpath(location)
        if whole in lines_of:
            raise ValueError(
                f"{source} names {name} more than once, in lines {lines_of[whole]} and {number}; "
                "each image may come once"
            )
        lines_of[whole] = number
        listing.take(Found(name, location, label=label))


def _lines(source: str) -> list[str]:
    if source.lower().endswith(COMPRESSED):
        raise ValueError(f"{source} is compressed; unpack it, or make a .tar of it, and name that")
    data = storage.read(source)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace").splitlines()
    if b"\0" in data:
        raise ValueError(f"{source} is neither a folder, a .tar nor a text file of paths")
    return data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape").splitlines()


def _read(line: str, folder: str) -> tuple[str, str, str]:
    """Name, class and location of the image of a line; without a location where no reading names a file."""
    for name, label in _readings(line):
        location = _location(name, folder)
        if location:
            return name, label, location
    return line.partition("\t")[0], "", ""


def _readings(line: str) -> Iterator[tuple[str, str]]:
    """Path and class as a line may mean them, likeliest first."""
    name, tab, label = line.partition("\t")
    if tab:
        yield name.strip(), label.strip()
        return
    whole = suffix_of(line) in SUFFIXES or not storage.is_remote(line)
    if whole:
        yield line, ""
    for at in range(len(line) - 1, 0, -1):
        if line[at] in " ,;":
            name, label = line[:at].rstrip(" ,;").strip("\"'"), line[at + 1 :].strip(" \"'")
            if not storage.is_remote(name) or suffix_of(name) in SUFFIXES:
                yield name, label
    if not whole:
        yield line, ""


def _location(name: str, folder: str) -> str:
    """Where a name of the list lies, relative ones beside the list; empty where there is no such file."""
    at = name if name.startswith("~") and Path(folder, name).is_file() else at_home(name)
    location = at if storage.is_remote(at) or at.startswith("/") or not folder else f"{folder}/{at}"
    if storage.is_remote(location):
        return location
    spellings = (None,) if location.isascii() else (None, "NFC", "NFD")  # macOS writes é as two characters
    for form in spellings:
        spelt = unicodedata.normalize(form, location) if form else location
        if os.path.isfile(spelt):  # noqa: PTH113 - a quarter of pathlib's time, for every line
            return spelt
    return ""
