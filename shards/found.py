"""What is met in a source while it is listed, and the class of each image there."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shards import storage

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?:[-_ .]?(?:images?|imgs?|set|data|split|\d+))*", re.IGNORECASE)


class Found(NamedTuple):
    """An image that a source holds, before its class has a number."""

    name: str
    location: str
    path: str = ""
    """Folders and name, which tell its class where no label does."""
    label: str = ""
    offset: int = 0
    size: int = storage.WHOLE_FILE
    fault: str = ""
    """Why it cannot be read, where that is known already."""


class Listing:
    """Images of a source, and how many files of each kind are none."""

    def __init__(self):
        self.images: list[Found] = []
        self.left_out: Counter[str] = Counter()
        self.keyed = False
        """Whether images in tars have a .json of their own, as in WebDataset's shards."""

    def take(self, found: Found) -> None:
        """Take an image; one whose name is not UTF-8 cannot be read, and is named with escapes."""
        try:
            found.name.encode()
        except UnicodeEncodeError:
            escaped = printable(found.name)
            found = found._replace(name=escaped, path=printable(found.path), fault="its name is not UTF-8; rename it")
        self.images.append(found._replace(label=printable(found.label)))


def printable(name: str) -> str:
    """A name in UTF-8: bytes of another encoding become `\\xe9`."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def labels_of(paths: Sequence[str], source: str) -> list[str]:
    """The class of each image, from its path: the first folder in which they differ. Empty for those beside them.

    Raises:
        ValueError: Those folders are the splits of a data set.
    """
    prefix = ""
    while True:
        below = [path[len(prefix) :] for path in paths if path.startswith(prefix)]
        tops = {path.partition("/")[0] for path in below if "/" in path}
        refuse_splits(tops, f"{source}/{prefix}".rstrip("/"))
        truth = sorted(tops & {"labels", "masks"})
        if "images" in tops and truth:
            raise ValueError(
                f"{source}/{prefix} holds images/ beside {' and '.join(truth)}/, which hold no images; name that folder"
            )
        if len(tops) != 1:
            break
        deeper = f"{prefix}{tops.pop()}/"
        if not any("/" in path[len(deeper) :] for path in paths if path.startswith(deeper)):
            break
        prefix = deeper
    skip = len(prefix)
    return [path[skip:].partition("/")[0] if path.startswith(prefix) and "/" in path[skip:] else "" for path in paths]


def refuse_splits(folders: Iterable[str], source: str) -> None:
    """Raises ValueError when two of `folders`, or more, are `train`, `val` or `test`, however they are spelt."""
    splits = {SPLITS[match[1].lower()]: name for name in sorted(folders) if (match := _SPLIT.fullmatch(name))}
    if len(splits) > 1:
        names = " and ".join(splits[split] for split in ("train", "val", "test") if split in splits)
        raise ValueError(
            f"{source} holds the splits {names}; name one of them, since as one set they would be trained and tested "
            "on alike, and taken for classes"
        )
