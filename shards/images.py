"""Images before they are shards: which there are, and their bytes."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shards import storage
from shards.places import at_home

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EXPECTED = "a folder, a text file of paths or a .tar"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where one image lies: a file, or a member of a tar."""

    name: str
    location: str
    """Path or URI of the file, or of the tar."""
    class_id: int = -1
    """-1 where there are no classes."""
    offset: int = 0
    size: int = storage.WHOLE_FILE


@dataclass(frozen=True, slots=True)
class ImageList:
    """The images of a source in the byte order of their names, and the classes they are of."""

    source: str
    images: tuple[ImageFile, ...]
    classes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over names and classes, in order: the identity of an input list."""
        rows = [[image.name, image.class_id] for image in self.images]
        return hashlib.sha256(json.dumps([self.classes, rows]).encode()).hexdigest()


def list_images(source: str | Path) -> ImageList:
    """The images in `source`.

    A folder (classes are its subfolders when all images are in two or more of them; `images/` beside `labels/` or
    `masks/` stands for the folder), a text file (a path or URI a line, paths relative to the file, then perhaps a tab
    and the class), a .tar, or a folder of tars (class from `KEY.cls`, else from the first folder of the names). Each
    may be in an object store: `s3://bucket/train`.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: There is no image in it, or a name twice.
    """
    source = str(source)
    found = list(_in_folder(source) if _is_folder(source) else _in_file(source))
    if not found:
        raise ValueError(f"no images in {source}: looked for {', '.join(SUFFIXES)}, found {_what_is_there(source)}")
    found.sort(key=lambda row: row[0].name.encode())
    names = Counter(image.name for image, _ in found)
    if len(names) < len(found):
        raise ValueError(f"{source} names {names.most_common(1)[0][0]} more than once; each image may come once")
    labels = {label for _, label in found}
    numbers = all(label.isdigit() for label in labels)
    classes = tuple(sorted(labels, key=int if numbers else str)) if "" not in labels and len(labels) > 1 else ()
    ids = {label: number for number, label in enumerate(classes)}
    images = tuple(
        ImageFile(image.name, image.location, ids.get(label, -1), image.offset, image.size) for image, label in found
    )
    return ImageList(source, images, classes)


def read_bytes(image: ImageFile) -> bytes:
    """The file or tar member of an image."""
    return storage.read(image.location, image.offset, image.size)


def _is_folder(source: str) -> bool:
    """Raises FileNotFoundError when there is nothing at `source`."""
    if storage.is_remote(source):
        return not storage.is_file(source)
    if not Path(source).exists():
        raise FileNotFoundError(f"no images at {source}: expected {EXPECTED}")
    return Path(source).is_dir()


def _in_folder(folder: str) -> Iterator[tuple[ImageFile, str]]:
    files = _files(folder)
    tars = [name for name in files if name.endswith(".tar") and "/" not in name and not name.startswith(".")]
    if tars:
        loose = next((name for name in files if _is_image(name)), None)
        if loose:
            raise ValueError(f"{folder} holds both tars ({tars[0]}) and images ({loose}); name a folder of one kind")
        for name in sorted(tars):
            yield from _in_tar(files[name])
        return
    if any(name.startswith("images/") for name in files) and any(
        name.startswith(("labels/", "masks/")) for name in files
    ):
        files = {name.removeprefix("images/"): at for name, at in files.items() if name.startswith("images/")}
    for name, location in files.items():
        if _is_image(name):
            yield ImageFile(name, location), name.partition("/")[0] if "/" in name else ""


def _files(folder: str) -> dict[str, str]:
    """Every file under a folder: its name relative to the folder, and where it lies."""
    if storage.is_remote(folder):
        root = folder.rstrip("/") + "/"
        try:
            return {location.removeprefix(root): location for location in storage.walk(folder)}
        except FileNotFoundError:
            raise FileNotFoundError(f"no images at {folder}: expected {EXPECTED}") from None
    paths = (Path(inside) / name for inside, _, names in os.walk(folder, followlinks=True) for name in names)
    return {path.relative_to(folder).as_posix(): str(path) for path in paths if path.is_file()}


def _is_image(name: str) -> bool:
    """By its suffix alone; what is none is rejected when it is decoded."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _in_file(source: str) -> Iterator[tuple[ImageFile, str]]:
    yield from _in_tar(source) if source.endswith(".tar") else _in_text(source)


def _in_text(source: str) -> Iterator[tuple[ImageFile, str]]:
    try:
        lines = storage.read(source).decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{source} is neither a folder, a .tar nor a text file of paths") from None
    folder = source.rpartition("/")[0]
    for number, line in enumerate(lines, start=1):
        name, _, label = line.strip().partition("\t")
        if not name:
            continue
        at = at_home(name)
        location = at if storage.is_remote(at) or at.startswith("/") or not folder else f"{folder}/{at}"
        if not storage.is_remote(location) and not Path(location).is_file():
            raise FileNotFoundError(f"{source} line {number} names {name}, which is no file")
        yield ImageFile(name, location), label


def _in_tar(location: str) -> Iterator[tuple[ImageFile, str]]:
    try:
        with storage.open_binary(location) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if member.isfile()]
            labels = {_key(m.name): _text(tar, m) for m in members if m.name.endswith(".cls")}
    except tarfile.TarError as error:
        raise ValueError(f"{location} is no whole, uncompressed tar ({error}); fetch it again or unpack it") from None
    folder = location.rpartition("/")[2]
    for member in members:
        name = member.name.removeprefix("./")
        if _is_image(name):
            label = labels.get(_key(member.name)) or (name.partition("/")[0] if "/" in name else "")
            yield ImageFile(f"{folder}/{name}", location, -1, member.offset_data, member.size), label


def _key(name: str) -> str:
    """WebDataset's key: the name up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    return file.read().decode().strip() if file else ""


def _what_is_there(source: str) -> str:
    if not _is_folder(source):
        return "nothing of that kind"
    suffixes = Counter(PurePosixPath(name).suffix or "no suffix" for name in _files(source))
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5)) or "an empty folder"
