"""Images before they are shards: which there are, their bytes and their pixels."""

import hashlib
import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image

from shards import storage
from shards.decode import Decoded, ImageError, decode_rgb, decode_square
from shards.formats import HEIF, HEIF_SUFFIXES
from shards.found import Listing, labels_of
from shards.image_folders import list_folder
from shards.image_tars import list_tar
from shards.image_texts import list_text

EXPECTED = "a folder, a text file of paths or a .tar"
KINDS_SAID = 8
_said: set[str] = set()


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where one image lies: a file, or a member of a tar."""

    name: str
    location: str
    """Path or URI of the file, or of the tar."""
    class_id: int = -1
    """-1 where there are no classes, or where this image has none."""
    offset: int = 0
    size: int = storage.WHOLE_FILE
    fault: str = ""
    """Why it cannot be read, where the listing saw it: a link that leads nowhere, say."""


@dataclass(frozen=True, slots=True)
class ImageList:
    """The images of a source in the byte order of their names, and the classes they are of."""

    source: str
    images: tuple[ImageFile, ...]
    classes: tuple[str, ...]
    left_out: tuple[tuple[str, int], ...] = ()
    """What else was met there, by kind (a suffix, `hidden`, `@eaDir`), and how often; the most frequent first."""

    @property
    def digest(self) -> str:
        """SHA-256 over names and classes, in order: the identity of an input list."""
        rows = [[image.name, image.class_id] for image in self.images]
        return hashlib.sha256(json.dumps([self.classes, rows]).encode()).hexdigest()

    @property
    def left_out_in_words(self) -> str:
        """`1 .heic, 2 without suffix`; empty where nothing was left out."""
        kinds = [f"{count:,} {kind}" for kind, count in self.left_out[:KINDS_SAID]]
        further = sum(count for _, count in self.left_out[KINDS_SAID:])
        told = ", ".join(kinds + ([f"{further:,} of other kinds"] if further else []))
        heic = not HEIF and any(kind in HEIF_SUFFIXES for kind, _ in self.left_out)
        return f"{told} (HEIC is read where pillow-heif is installed)" if heic else told

    @property
    def remark(self) -> str:
        """One sentence of what was seen and is not an image with a class like the others; empty where all are."""
        without = [image.name for image in self.images if image.class_id < 0] if self.classes else []
        faulty = [image for image in self.images if image.fault]
        told = []
        if faulty:
            told.append(f"{len(faulty):,} cannot be read, the first, {faulty[0].name}: {faulty[0].fault}")
        if without:
            told.append(f"{len(without):,} without a class, the first {without[0]}")
        if self.left_out:
            told.append(f"left out: {self.left_out_in_words}")
        images = "1 image" if len(self.images) == 1 else f"{len(self.images):,} images"
        return f"{self.source}: {images}; {'; '.join(told)}" if told else ""


def list_images(source: str | Path) -> ImageList:
    """The images in `source`; what else is met there is said on stderr, once a process.

    A folder (`images/` beside `labels/` or `masks/` stands for the folder), a text file (a path or URI a line, paths
    relative to the file, then perhaps a tab, comma or blank and the class), a .tar, also of tars, or a folder of tars.
    Each may be in an object store: `s3://bucket/train`.

    Classes are those of `KEY.cls` or of the text file; else the first folders in which names differ; else the tars.
    There are none unless there are two or more; an image without one has class id -1.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: There is no image in it, a name twice, splits of a data set, a folder that may not be read, or a
            tar that is cut.
    """
    source = str(source)
    listing = Listing()
    if _is_folder(source):
        list_folder(source, listing)
    elif source.endswith(".tar"):
        list_tar(source, listing, source.rpartition("/")[2])
    else:
        list_text(source, listing)
    found = listing.images
    listed = ImageList(source, (), (), tuple(listing.left_out.most_common()))
    if not found:
        raise ValueError(
            f"no images in {source}: looked for .jpg, .png, .webp and what else Pillow reads, found "
            f"{listed.left_out_in_words or 'an empty folder'}"
        )
    labels = (
        [one.label for one in found] if any(one.label for one in found) else labels_of([o.path for o in found], source)
    )
    present = set(labels) - {""}
    numbers = all(label.isdecimal() for label in present)
    order = sorted(present, key=lambda label: (int(label) if numbers else 0, label))
    classes = tuple(order) if len(order) > 1 else ()
    ids = {label: number for number, label in enumerate(classes)}
    images = sorted(
        (
            ImageFile(one.name, one.location, ids.get(label, -1), one.offset, one.size, one.fault)
            for one, label in zip(found, labels, strict=True)
        ),
        key=lambda image: image.name.encode(),
    )
    for one, following in pairwise(images):
        if one.name == following.name:
            raise ValueError(f"{source} names {one.name} more than once; each image may come once")
    listed = ImageList(source, tuple(images), classes, listed.left_out)
    _say(listed.remark)
    return listed


def read_bytes(image: ImageFile) -> bytes:
    """The file or tar member of an image.

    Raises:
        OSError: It cannot be read.
    """
    if image.fault:
        raise OSError(image.fault)
    return storage.read(image.location, image.offset, image.size)


def read_rgb(image: ImageFile) -> Image.Image:
    """The pixels of an image, as `decode_rgb` gives them.

    Raises:
        ImageError: It cannot be read or decoded; `step` says which.
    """
    return decode_rgb(_bytes(image))


def read_square(image: ImageFile, size: int, *, offset: float = 0.5) -> Decoded:
    """The square of an image at `offset` along its long side, of `size` pixels a side, as `square` cuts it.

    Raises:
        ImageError: It cannot be read or decoded; `step` says which.
    """
    return decode_square(_bytes(image), size, offset=offset)


def _bytes(image: ImageFile) -> bytes:
    try:
        return read_bytes(image)
    except OSError as error:
        raise ImageError(str(error), step="read") from error


def _is_folder(source: str) -> bool:
    """Raises FileNotFoundError when there is nothing at `source`."""
    if storage.is_remote(source):
        return not storage.is_file(source)
    try:
        if Path(source).exists():
            return Path(source).is_dir()
    except PermissionError:
        raise ValueError(f"{source} may not be read by this user; make it readable, or move it elsewhere") from None
    raise FileNotFoundError(f"no images at {source}: expected {EXPECTED}")


def _say(remark: str) -> None:
    if remark and remark not in _said:
        _said.add(remark)
        print(remark, file=sys.stderr)
