"""The images in a folder, here or in an object store."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards import storage
from shards.formats import (
    FIRST_BYTES,
    OTHERS,
    SUFFIXES,
    is_sheet,
    kind_of,
    set_aside,
    starts_like_an_image,
    suffix_of,
)
from shards.found import Found, Listing
from shards.image_tars import list_tars

UNREADABLE = "{} may not be read by this user; make it readable, or move it elsewhere"
MOST_ASKED = 10_000
"""Files of an object store whose first bytes are asked for, each a request."""


def list_folder(folder: str, listing: Listing) -> None:
    """Take the images in a folder, or those in its tars.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A folder in it may not be read, or it holds tars and images.
    """
    files = _without_ours(_files(folder, listing), listing)
    tars = {name: at for name, (at, fault) in files.items() if name.endswith(".tar") and "/" not in name and not fault}
    if any(name.startswith("images/") for name in files) and any(
        name.startswith(("labels/", "masks/")) for name in files
    ):
        beside = [name for name in files if not name.startswith(("images/", "labels/", "masks/", "labels.txt"))]
        listing.left_out.update(["beside images/"] * len(beside))
        files = {name[7:]: at for name, at in files.items() if name.startswith("images/")}
        tars = {}
    unsure: list[tuple[str, str]] = []
    for name, (location, fault) in files.items():
        suffix = suffix_of(name)
        if suffix == ".png" and "/" not in name and _is_sheet(location, fault):
            listing.left_out["sheet of ours"] += 1
        elif suffix in SUFFIXES:
            listing.take(Found(name, location, name, fault=fault))
        elif fault:
            listing.left_out["links that lead nowhere"] += 1
        elif suffix in OTHERS:
            if name not in tars:
                listing.left_out[suffix] += 1
        else:
            unsure.append((name, location))
    for name, location in _ask(unsure, listing):
        listing.take(Found(name, location, name))
    if tars:
        if listing.images:
            one, other = next(iter(tars)), listing.images[0].name
            raise ValueError(f"{folder} holds both tars ({one}) and images ({other}); name a folder of one kind")
        list_tars(tars, folder, listing)


def _ask(unsure: list[tuple[str, str]], listing: Listing) -> Iterator[tuple[str, str]]:
    """Those that start like an image; the others are counted by kind."""
    remote = bool(unsure) and storage.is_remote(unsure[0][1])
    asked = unsure[:MOST_ASKED] if remote else unsure
    with ThreadPoolExecutor(16 if remote else 1) as pool:
        for (name, location), is_one in zip(asked, pool.map(lambda file: _starts(file[1]), asked), strict=True):
            if is_one:
                yield name, location
            else:
                listing.left_out[kind_of(name)] += 1
    for name, _ in unsure[len(asked) :]:
        listing.left_out[kind_of(name)] += 1


def _is_sheet(location: str, fault: str) -> bool:
    """Only PNGs beside class folders are opened for this, and none in a store."""
    if fault or storage.is_remote(location):
        return False
    try:
        return is_sheet(storage.read(location, 0, 64))
    except OSError:
        return False


def _starts(location: str) -> bool:
    try:
        return starts_like_an_image(storage.read(location, 0, FIRST_BYTES))
    except OSError:
        return False


def _files(folder: str, listing: Listing) -> dict[str, tuple[str, str]]:
    """Every file under a folder that may be an image: by its name relative to the folder, where it lies and, of a
    link that leads nowhere, that it does."""
    files: dict[str, tuple[str, str]] = {}
    if storage.is_remote(folder):
        root = folder.rstrip("/") + "/"
        try:
            for location in storage.walk(folder):
                _keep(location.removeprefix(root), location, "", files, listing)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no images at {folder}: expected a folder, a text file of paths or a .tar"
            ) from None
    else:
        for name, location, fault in _walk(folder, listing):
            _keep(name, location, fault, files, listing)
    return files


def _keep(name: str, location: str, fault: str, files: dict[str, tuple[str, str]], listing: Listing) -> None:
    aside = set_aside(name)
    if aside:
        listing.left_out[aside] += 1
    else:
        files[name] = (location, fault)


def _walk(folder: str, listing: Listing) -> Iterator[tuple[str, str, str]]:
    """Name, location and fault of every file, each folder once: real ones first, then those that links lead to."""
    root = os.path.realpath(folder)  # of 1.28 million names, pathlib alone would take ten seconds
    seen = set()
    waiting, linked = [(folder, "")], []
    while waiting or linked:
        inside, prefix = waiting.pop() if waiting else linked.pop(0)
        try:
            where = Path(inside).stat()
        except PermissionError:
            raise ValueError(UNREADABLE.format(inside)) from None
        if (where.st_dev, where.st_ino) in seen or (prefix and _is_above(os.path.realpath(inside), root)):
            listing.left_out["links to folders that are read already, or that hold this one"] += 1
            continue
        seen.add((where.st_dev, where.st_ino))
        for entry in _entries(inside):
            name = prefix + entry.name
            if _is_folder(entry):
                aside = set_aside(name)
                if aside:
                    listing.left_out[aside] += 1
                elif entry.is_symlink():
                    linked.append((entry.path, f"{name}/"))
                else:
                    waiting.append((entry.path, f"{name}/"))
            else:
                fault = _fault(entry)
                if fault is None:
                    listing.left_out["neither file nor folder"] += 1
                else:
                    yield name, entry.path, fault


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        raise ValueError(UNREADABLE.format(folder)) from None


def _is_above(folder: str, root: str) -> bool:
    return root == folder or root.startswith(folder.rstrip("/") + "/")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _fault(entry: os.DirEntry[str]) -> str | None:
    """Empty for a file, the reason for a link that leads nowhere, None for what is no file."""
    try:
        if entry.is_file():
            return ""
        if not entry.is_symlink():
            return None
        Path(entry.path).stat()
        return None
    except FileNotFoundError:
        return f"a link to {Path(entry.path).readlink()}, where there is no file"
    except PermissionError:
        return f"a link to {Path(entry.path).readlink()}, which this user may not reach"
    except OSError as error:
        return f"a link that cannot be followed ({error.strerror})"


def _without_ours(files: dict[str, tuple[str, str]], listing: Listing) -> dict[str, tuple[str, str]]:
    """Without the figures and shards in run folders and shard sets of ours, each counted once."""
    runs = {name.removesuffix("environment.json") for name in files if name.endswith("/environment.json")}
    sets = {name.removesuffix("plan.json") for name in files if name.endswith("/plan.json")}
    shards = {f"{name.partition('/shards/')[0]}/" for name in files if "/shards/" in name} if sets else set()
    ours = {folder for folder in runs if f"{folder}config.json" in files} | (sets & shards)
    if not ours:
        return files
    ours = {folder for folder in ours if not any(above in ours for above in _above(folder))}
    listing.left_out["run folder or shard set"] += len(ours)
    return {name: at for name, at in files.items() if not any(above in ours for above in _above(name))}


def _above(name: str) -> Iterable[str]:
    """Every folder that a name lies in, with its slash, but for the name itself."""
    at = name.rstrip("/").find("/")
    while at >= 0 and at < len(name) - 1:
        yield name[: at + 1]
        at = name.find("/", at + 1)
