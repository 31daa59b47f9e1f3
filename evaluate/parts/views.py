"""Images with known parts or masks, seen through square crops: pixels, and true labels of the same cells."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from shards.images import ImageFile, list_images, read_rgb
from shards.truth import UNKNOWN, TruthFiles, cells_of


@dataclass(frozen=True, slots=True)
class Crop:
    """A square of an image in its pixels."""

    x0: int
    y0: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return (self.x0, self.y0, self.x0 + self.side, self.y0 + self.side)


CropOf = Callable[[int, int, int], Crop]
"""The crop of an image of a width and a height, by its place in the list."""


@dataclass(frozen=True, slots=True)
class SquareView:
    """The same crop of every image of a set."""

    images: UInt8[np.ndarray, "images side side 3"]
    truth: Int[np.ndarray, "images grid grid"]
    """0 background, 255 unknown, else a part."""
    off_centre: Bool[np.ndarray, " images"]
    """Which of the crops lie a cell or more from the centre square. A square image has none, and one view alone."""

    def only(self, chosen: Bool[np.ndarray, " images"]) -> "SquareView":
        """The chosen images."""
        return SquareView(self.images[chosen], self.truth[chosen], self.off_centre[chosen])


class TruthSet:
    """`images/NAME.jpg` with `labels/NAME.png` (part ids, 0 = background, 255 unknown) or `masks/NAME.png` (0, 255).

    Raises:
        FileNotFoundError: An image has no truth, or there is no such folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = list_images(folder).images
        self._truth = TruthFiles(folder, [image.name for image in self.images])

    def centre(self, *, size: int, grid: int) -> SquareView:
        """The centre squares of the short side, as extraction stores them.

        Raises:
            ValueError: No cell of any has a part, and nothing could be scored.
        """
        view = self._view(_centre, size, grid, self.images)
        if np.isin(view.truth, (0, UNKNOWN)).all():
            raise ValueError(
                f"no centre square of {self.folder} has a part: all is 0 or 255; check its labels or masks"
            )
        return view

    def first(self, count: int, *, size: int, grid: int) -> SquareView:
        """The centre squares of the first images alone, to be shown."""
        return self._view(_centre, size, grid, self.images[:count])

    def ends(self, *, size: int, grid: int) -> SquareView:
        """The squares at the ends of the long side, one end and the other by turns: place tells less of the parts."""
        return self._view(lambda width, height, index: _square(width, height, index % 2), size, grid, self.images)

    def shifted(self, *, size: int, grid: int) -> tuple[SquareView, SquareView]:
        """Two crops of every image, the second `shift_cells` further right: together about as wide as the short side.

        Their side is such that the distance is a whole number of pixels: cells that both show hold the same ones.
        """
        cells = shift_cells(grid)
        unit = grid // math.gcd(grid, cells)

        def crop(width: int, height: int, step: int) -> Crop:
            side = min(width, height) * grid // (grid + cells) // unit * unit
            distance = side * cells // grid
            return Crop((width - side - distance) // 2 + step * distance, (height - side) // 2, side)

        return (
            self._view(lambda width, height, index: crop(width, height, 0), size, grid, self.images),
            self._view(lambda width, height, index: crop(width, height, 1), size, grid, self.images),
        )

    def _view(self, crop_of: CropOf, size: int, grid: int, files: Sequence[ImageFile]) -> SquareView:
        pixels, cells, moved = zip(*self._crops(crop_of, size, grid, files), strict=True)
        return SquareView(np.stack(pixels), np.stack(cells), np.array(moved))

    def _crops(
        self, crop_of: CropOf, size: int, grid: int, files: Sequence[ImageFile]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        for index, file in enumerate(files):
            image = read_rgb(file)
            crop, centre = crop_of(*image.size, index), _centre(*image.size, index)
            if crop.side < grid:
                raise ValueError(
                    f"{file.name} is {image.width}x{image.height}: too small for crops of {grid} cells a side; "
                    "choose a smaller --grid"
                )
            true = self._truth.read_for(file.name, image.size)
            cells = cells_of(true[crop.y0 : crop.y0 + crop.side, crop.x0 : crop.x0 + crop.side], grid)
            moved = max(abs(crop.x0 - centre.x0), abs(crop.y0 - centre.y0)) * grid >= crop.side
            yield np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=crop.box)), cells, moved


def shift_cells(grid: int) -> int:
    """How far apart the crops of the shift test lie: a quarter of their side in whole cells, at least one."""
    return max(1, round(grid / 4))


def _centre(width: int, height: int, index: int) -> Crop:
    return _square(width, height, 0.5)


def _square(width: int, height: int, offset: float) -> Crop:
    side = min(width, height)
    return Crop(round((width - side) * offset), round((height - side) * offset), side)
