"""True boxes of images: a text file, a line a box."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

LINE = "NAME X0 Y0 X1 Y1, in pixels of the image, the last ones included"

Corners = tuple[int, int, int, int]


class BoxFile:
    """Of every image its boxes as one part, as `shards.truth.TruthFiles` gives part maps.

    The file may name images from a folder further up than `names` do: `train/cat/1.jpg` for `cat/1.jpg`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is no box, or an image has none.
    """

    def __init__(self, file: Path, names: Sequence[str]):
        self.at = file
        lines = _read(file)
        prefix = _prefix(file, lines, names)
        boxless = [name for name in names if prefix + name not in lines]
        if boxless:
            raise ValueError(
                f"{len(boxless):,} of {len(names):,} images have no box in {file}, the first is {boxless[0]}; give "
                "each a line, or leave the images out"
            )
        self.boxes = {name: lines[prefix + name] for name in names}
        self.unused = len(lines) - len(self.boxes)
        """Images that the file names and the set has not."""

    def path(self, name: str) -> Path:
        """The file that says it, whatever the image."""
        return self.at

    def digests(self, names: Sequence[str]) -> dict[str, Any]:
        """What decides the labels of each image."""
        return {name: self.boxes[name] for name in names}

    def read_for(self, name: str, size: tuple[int, int]) -> UInt8[np.ndarray, "height width"]:
        """1 inside a box, 0 elsewhere, of an image of `size` (width, height) as it is shown.

        Raises:
            ValueError: A box reaches beyond the image.
        """
        inside = np.zeros(size[::-1], np.uint8)
        for box in self.boxes[name]:
            x0, y0, x1, y1 = box
            if not (0 <= x0 <= x1 < size[0] and 0 <= y0 <= y1 < size[1]):
                raise ValueError(
                    f"the box {' '.join(map(str, box))} of {name} in {self.at} does not lie in its image of "
                    f"{size[0]}x{size[1]} pixels as shown (turned as its EXIF says); a line is {LINE}"
                )
            inside[y0 : y1 + 1, x0 : x1 + 1] = 1
        return inside

    def count_parts(self, names: Sequence[str]) -> int:
        """One: inside."""
        return 1


def _read(file: Path) -> dict[str, list[Corners]]:
    lines: dict[str, list[Corners]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        name, *corners = line.rsplit(maxsplit=4)
        try:
            x0, y0, x1, y1 = map(int, corners)
        except ValueError:
            raise ValueError(f"line {number} of {file} is no box: {line[:80]!r}; expected {LINE}") from None
        lines.setdefault(name, []).append((x0, y0, x1, y1))
    return lines


def _prefix(file: Path, lines: Iterable[str], names: Collection[str]) -> str:
    """What the file has before every name of `names`: nothing where it has some of them as they are.

    Raises:
        ValueError: Images may be one of several.
    """
    wanted, found = set(names), dict[str, str]()
    for line in lines:
        folders = line.split("/")
        for depth in range(len(folders)):
            if (name := "/".join(folders[depth:])) in wanted:
                found.setdefault(line.removesuffix(name), line)
    if "" in found or not found:
        return ""
    first, *others = found.values()
    if others:
        raise ValueError(
            f"{file} has boxes of {first} and {others[0]}, whose images may be the same; name images in it as they are "
            "named below --images"
        )
    return next(iter(found))
