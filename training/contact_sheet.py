"""Contact sheets: columns of images under their names, label maps as colours, ranks as brightness."""

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from shards.formats import OF_OURS

ROWS, CELL, GAP, HEADER, LINE = 8, 112, 4, 22, 14
COLOURS = np.array(
    [[230, 75, 60], [52, 152, 219], [241, 196, 15], [46, 204, 113], [155, 89, 182], [230, 126, 34], [26, 188, 156],
     [236, 120, 180], [120, 144, 156], [121, 85, 72], [205, 220, 57], [63, 81, 181]], np.float32
)  # fmt: skip
BACKGROUND = np.array([60, 60, 60], np.float32)


def tinted(images: np.ndarray, parts: np.ndarray, groups: int) -> np.ndarray:
    """A colour a part over its image; the last of the groups, the background, is dark, whether or not any cell has
    it."""
    palette = np.concatenate([COLOURS[np.arange(groups - 1) % len(COLOURS)], BACKGROUND[None]])
    return 0.35 * images + 0.65 * enlarged(palette[parts], images.shape[1])


def brightness(fgrank: np.ndarray) -> np.ndarray:
    """1 for the best rank, 0.1 for the last, as (images, rows, cols, 1)."""
    return (1 - 0.9 * fgrank.astype(np.float32) / fgrank[0].size)[..., None]


def enlarged(grid: np.ndarray, size: int) -> np.ndarray:
    """Cells as squares of pixels; sizes that cells do not divide take the nearest cell."""
    rows = np.arange(size) * grid.shape[1] // size
    return grid[:, rows][:, :, rows]


def png_of(names: Sequence[str], columns: Sequence[np.ndarray]) -> bytes:
    """What `assemble` gives, as a PNG that no listing takes for an image of a data set."""
    buffer, text = io.BytesIO(), PngInfo()
    text.add_text(*OF_OURS)
    assemble(names, columns).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def assemble(names: Sequence[str], columns: Sequence[np.ndarray]) -> Image.Image:
    """Columns of images, each under its name, on as many lines as the longest needs."""
    step, rows = CELL + GAP, len(columns[0])
    texts = ["\n".join(textwrap.wrap(name, 17)) for name in names]
    header = HEADER + LINE * max(text.count("\n") for text in texts)
    sheet = Image.new("RGB", (GAP + step * len(columns), header + step * rows), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, (text, images) in enumerate(zip(texts, columns, strict=True)):
        middle = (GAP + step * column + CELL / 2, header / 2)
        pen.text(middle, text, fill="black", font=font, anchor="mm", align="center")
        for row, image in enumerate(images):
            tile = Image.fromarray(image.clip(0, 255).astype(np.uint8))
            enlarge = Image.Resampling.LANCZOS if tile.width > CELL else Image.Resampling.NEAREST
            sheet.paste(tile.resize((CELL, CELL), enlarge), (GAP + step * column, header + step * row))
    return sheet
