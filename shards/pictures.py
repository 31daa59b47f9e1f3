"""Pictures before they are shards: which there are, and their pixels as RGB."""

import hashlib
import io
import json
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
WHOLE_FILE = -1
Box = tuple[float, float, float, float]


class PictureError(ValueError):
    """A picture that cannot be decoded; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Where one picture lies: a file, or a member of a tar."""

    name: str
    path: Path
    class_id: int = -1
    """-1 where there are no classes."""
    offset: int = 0
    size: int = WHOLE_FILE


@dataclass(frozen=True, slots=True)
class PictureList:
    """The pictures of a source in the byte order of their names, and the classes they are of."""

    source: str
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over names and classes, in order: the identity of an input list."""
        rows = [[picture.name, picture.class_id] for picture in self.pictures]
        return hashlib.sha256(json.dumps([self.classes, rows]).encode()).hexdigest()


def list_pictures(source: str | Path) -> PictureList:
    """The pictures in `source`.

    A folder (classes are its subfolders when all pictures lie in two or more of them; `images/` beside `labels/` or
    `masks/` stands for the folder), a text file (a path a line, relative to the file, then perhaps a tab and the
    class), a .tar, or a folder of tars (class from `KEY.cls`, else from the first folder of the names).

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: There is no picture in it, or a name twice.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no pictures at {source}: expected a folder, a text file of paths or a .tar")
    tars = [tar for tar in sorted(path.glob("*.tar")) if not tar.name.startswith(".")] if path.is_dir() else []
    if path.suffix == ".tar" or tars:
        found = [row for tar in (tars or [path]) for row in _in_tar(tar)]
    elif path.is_dir():
        found = list(_in_folder(path))
    else:
        found = list(_in_text(path))
    if not found:
        raise ValueError(f"no pictures in {source}: looked for {', '.join(SUFFIXES)}, found {_what_is_there(path)}")
    found.sort(key=lambda row: row[0].name.encode())
    names = Counter(picture.name for picture, _ in found)
    if len(names) < len(found):
        raise ValueError(f"{source} names {names.most_common(1)[0][0]} more than once; each picture may come once")
    labels = {label for _, label in found}
    classes = tuple(sorted(label for label in labels if label)) if "" not in labels and len(labels) > 1 else ()
    ids = {label: number for number, label in enumerate(classes)}
    pictures = tuple(
        Picture(picture.name, picture.path, ids.get(label, -1), picture.offset, picture.size)
        for picture, label in found
    )
    return PictureList(str(source), pictures, classes)


def read_bytes(picture: Picture) -> bytes:
    """The file or tar member of a picture."""
    with open(picture.path, "rb") as file:
        file.seek(picture.offset)
        return file.read(picture.size)


def decode_rgb(data: bytes) -> Image.Image:
    """RGB pixels, upright, whatever was stored: CMYK, grey, palette; 16 bits are scaled, alpha lies over white.

    Raises:
        PictureError: The bytes are no whole picture.
    """
    try:
        with _quiet_pillow(), Image.open(io.BytesIO(data)) as image:
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise many kinds for broken files; each is this picture's reason
        raise PictureError(" ".join(str(error).split()) or type(error).__name__) from error


def square(image: Image.Image, size: int, *, offset: float = 0.5) -> tuple[Image.Image, Box]:
    """The square of the short side, at `offset` (0 to 1) along the long side, resized to `size`; and its box in
    source pixels (x0, y0, x1, y1). Bicubic, antialiased."""
    width, height = image.size
    side = min(width, height)
    x0, y0 = round((width - side) * offset), round((height - side) * offset)
    box = (float(x0), float(y0), float(x0 + side), float(y0 + side))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box), box


_decoding, _decoding_lock, _filters = 0, threading.Lock(), warnings.catch_warnings()


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow's warnings are silent, but for a decompression bomb, which is an error.

    Filters belong to the process: were each thread to put back the ones it found, the last would put back another
    thread's. So the first one in sets them, and the last one out restores them.
    """
    global _decoding, _filters
    with _decoding_lock:
        if not _decoding:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
        _decoding += 1
    try:
        yield
    finally:
        with _decoding_lock:
            _decoding -= 1
            if not _decoding:
                _filters.__exit__(None, None, None)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        image = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _in_folder(folder: Path) -> Iterator[tuple[Picture, str]]:
    if (folder / "images").is_dir() and ((folder / "labels").is_dir() or (folder / "masks").is_dir()):
        folder = folder / "images"
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if _is_picture(relative) and path.is_file():
            yield Picture(relative.as_posix(), path), relative.parts[0] if len(relative.parts) > 1 else ""


def _is_picture(name: PurePath) -> bool:
    """By its suffix alone; what is none is rejected when it is decoded."""
    return name.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in name.parts)


def _in_text(path: Path) -> Iterator[tuple[Picture, str]]:
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is neither a folder, a .tar nor a text file of paths") from None
    for number, line in enumerate(lines, start=1):
        name, _, label = line.strip().partition("\t")
        if not name:
            continue
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path} line {number} names {name}, which is no file")
        yield Picture(name, path.parent / name), label


def _in_tar(path: Path) -> Iterator[tuple[Picture, str]]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
            labels = {_key(m.name): _text(tar, m) for m in members if m.name.endswith(".cls")}
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole, uncompressed tar ({error}); fetch it again or unpack it") from None
    for member in members:
        name = PurePosixPath(member.name)
        if _is_picture(name):
            label = labels.get(_key(member.name)) or (name.parts[0] if len(name.parts) > 1 else "")
            yield Picture(f"{path.name}/{member.name}", path, -1, member.offset_data, member.size), label


def _key(name: str) -> str:
    """WebDataset's key: the name up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    return file.read().decode().strip() if file else ""


def _what_is_there(path: Path) -> str:
    if not path.is_dir():
        return "nothing of that kind"
    suffixes = Counter(p.suffix or "no suffix" for p in path.rglob("*") if p.is_file())
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5)) or "an empty folder"
