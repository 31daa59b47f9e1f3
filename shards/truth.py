"""True parts of images, where people drew them: which file holds them, and the label of a cell of a grid."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int, Integer
from PIL import Image

from shards.atomic import sha256_file

UNKNOWN = 255


class TruthFiles:
    """Of images `NAME.jpg`: `labels/NAME.png` in `folder` (part ids, 0 = background, 255 = unknown) or, where there
    is no labels/, `masks/NAME.png` (0 and 255: one part).

    Raises:
        FileNotFoundError: An image has no truth; the message says the layout.
    """

    def __init__(self, folder: Path, names: Sequence[str]):
        self.only_masks = not (folder / "labels").is_dir()
        self.at = folder / ("masks" if self.only_masks else "labels")
        missing = next((path for path in map(self.path, names) if not path.is_file()), None)
        if missing:
            inside = f"; give {folder.parent}, not its images/" if folder.name == "images" else ""
            raise FileNotFoundError(
                f"{missing} is missing: every image needs its truth, images/NAME.jpg beside labels/NAME.png (part "
                f"ids, 0 = background, 255 = unknown) or masks/NAME.png (0 and 255), of the image's size{inside}"
            )

    def path(self, name: str) -> Path:
        return self.at / PurePosixPath(name).with_suffix(".png")

    def digests(self, names: Sequence[str]) -> dict[str, Any]:
        """What decides the labels of each image."""
        return {name: sha256_file(self.path(name)) for name in names}

    def read(self, name: str) -> Integer[np.ndarray, "height width"]:
        """Part id of each pixel.

        Raises:
            ValueError: The PNG is no map of one number a pixel, or no mask of 0 and 255.
        """
        with Image.open(self.path(name)) as image:
            if self.only_masks:
                mask = np.asarray(image.convert("L"))
                if 0 < mask.max() <= 127:
                    raise ValueError(
                        f"{self.path(name)} holds values up to {mask.max()} and no 255; a mask is 0 and 255 (part ids "
                        "belong in labels/)"
                    )
                return (mask > 127).astype(np.uint8)
            ids = np.asarray(image)
        if ids.ndim != 2:
            raise ValueError(f"{self.path(name)} has {ids.shape[2]} channels, expected one: the part id of each pixel")
        return ids.astype(np.uint8) if ids.dtype == bool else ids

    def read_for(self, name: str, size: tuple[int, int]) -> Integer[np.ndarray, "height width"]:
        """The same, for an image of `size` (width, height) as it is shown.

        Raises:
            ValueError: The map is of another size.
        """
        ids = self.read(name)
        if ids.shape[::-1] != tuple(size):
            raise ValueError(
                f"{self.path(name)} is {ids.shape[1]}x{ids.shape[0]}, but its image is {size[0]}x{size[1]} as shown "
                "(turned as its EXIF says); give the map the image's size and orientation"
            )
        return ids

    def count_parts(self, names: Sequence[str]) -> int:
        """The largest part id: of labels.txt (a line a part: id, tab, name), in the folder or in the one above, where
        splits share it; or else of the images' labels. Masks have one part.

        Raises:
            ValueError: A line of labels.txt begins with no id.
        """
        if self.only_masks:
            return 1
        for file in (self.at.parent / "labels.txt", self.at.parent.parent / "labels.txt"):
            if file.is_file():
                return _largest(file)
        return max(int(np.max(ids, where=ids != UNKNOWN, initial=0)) for ids in map(self.read, names))


def cells_of(label_map: Integer[np.ndarray, "height width"], grid: int) -> Int[np.ndarray, "grid grid"]:
    """The commonest label among a cell's pixels, of equals the lowest; pixel y is in row y · grid // height.

    Raises:
        ValueError: The map has fewer pixels than cells along a side.
    """
    height, width = label_map.shape
    if min(height, width) < grid:
        raise ValueError(f"a label map must have at least {grid} pixels a side for its grid, got {width}x{height}")
    values, index = np.unique(label_map, return_inverse=True)
    rows, cols = np.arange(height) * grid // height, np.arange(width) * grid // width
    cell = rows[:, None] * grid + cols
    counts = np.bincount(
        (cell * len(values) + index.reshape(height, width)).ravel(), minlength=grid * grid * len(values)
    )
    return values[counts.reshape(grid, grid, len(values)).argmax(axis=2)].astype(np.int64)


def _largest(file: Path) -> int:
    """The largest id of a labels.txt, but for 255."""
    ids = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    wrong = next((one for one in ids if not one.isdigit()), None)
    if wrong:
        raise ValueError(f"a line of {file} begins with {wrong!r}, expected a part id, a tab and the part's name")
    return max((int(one) for one in ids if int(one) != UNKNOWN), default=0)
