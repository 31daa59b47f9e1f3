"""One picture that shows the whole method: pictures, parts, foreground, masks as training goes on, reconstructions."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pipeline.truth import parts_of_set
from pretrain.config import PretrainConfig, StreamRun
from pretrain.masks import Masked, mask_batch
from pretrain.train import MEAN, STD, build
from shards.atomic import read_json, write_whole
from shards.batches import Batch, in_order
from shards.order import permutation
from shards.shard_set import ShardSet
from training.checkpoint import find, load_tensors

ROWS, CELL, GAP, HEADER, LINE = 8, 112, 4, 22, 14
COLOURS = np.array(
    [[230, 75, 60], [52, 152, 219], [241, 196, 15], [46, 204, 113], [155, 89, 182], [230, 126, 34], [26, 188, 156],
     [236, 120, 180], [120, 144, 156], [121, 85, 72], [205, 220, 57], [63, 81, 181]], np.float32
)  # fmt: skip
BACKGROUND, HIDDEN = np.array([60, 60, 60], np.float32), 235
COLUMNS = ("picture", "parts", "foreground", "mask at 0 %", "at 50 %", "at 100 %", "rebuilt (0 %)", "rebuilt (100 %)")


def draw_sheet(path: Path, *, shards: ShardSet, run: Path, seed: int) -> Path:
    """Write the sheet of a pretraining run to `path` (PNG), on pictures of `shards` drawn by `seed`."""
    config, batch = _config(run), _pick(shards, seed)
    model = build(config, shards.size).eval()
    model.load_state_dict(load_tensors(find(run))[0])
    masks = [
        mask_batch(batch, config, side=model.side, groups=shards.groups, alpha=progress**config.gamma)
        for progress in (0.0, 0.5, 1.0)
    ]
    images = batch.images.astype(np.float32)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std

    def rebuilt(masked: Masked) -> np.ndarray:
        picture = model.reconstruct(pixels, masked.ids_visible, masked.ids_hidden) * std + mean
        return (picture.permute(0, 2, 3, 1).numpy() * 255).clip(0, 255)

    columns = [
        images,
        tinted(images, batch.parts, 1 + parts_of_set(shards)),
        images * enlarged(brightness(batch.fgrank), shards.size),
        *(_with_holes(images, masked, model.side) for masked in masks),
        rebuilt(masks[0]),
        rebuilt(masks[2]),
    ]
    buffer = io.BytesIO()
    assemble(COLUMNS, columns).save(buffer, "PNG")
    write_whole(path, buffer.getvalue())
    return path


def _config(run: Path) -> PretrainConfig:
    """The run's config with semantic masking, for drawing."""
    values = {name: value for name, value in read_json(run / "config.json").items() if name not in ("run", "verb")}
    return PretrainConfig(**values | {"masking": "semmae"}, run=StreamRun(out=run))


def _pick(shards: ShardSet, seed: int) -> Batch:
    """The first ROWS samples of the seed's order."""
    wanted = np.sort(permutation(len(shards), seed=seed, epoch=0)[:ROWS])
    pieces = [batch for batch in in_order(shards, batch_size=1) if batch.indices[0] in wanted]
    names = ("images", "parts", "fgrank", "class_ids", "indices", "epochs")
    return Batch(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in names), position=0)


def tinted(images: np.ndarray, parts: np.ndarray, groups: int) -> np.ndarray:
    """A colour a part over its picture; the last of the groups, the background, is dark, whether or not any cell has
    it."""
    palette = np.concatenate([COLOURS[np.arange(groups - 1) % len(COLOURS)], BACKGROUND[None]])
    return 0.35 * images + 0.65 * enlarged(palette[parts], images.shape[1])


def brightness(fgrank: np.ndarray) -> np.ndarray:
    """1 for the best rank, 0.1 for the last, as (pictures, rows, cols, 1)."""
    return (1 - 0.9 * fgrank.astype(np.float32) / fgrank[0].size)[..., None]


def _with_holes(images: np.ndarray, masked: Masked, side: int) -> np.ndarray:
    """What the encoder sees: hidden patches, and those that take no part, are blank."""
    seen = torch.zeros(len(images), side * side).scatter_(1, masked.ids_visible, 1.0).reshape(-1, side, side, 1)
    window = enlarged(seen.numpy(), images.shape[1])
    return images * window + HIDDEN * (1 - window)


def enlarged(grid: np.ndarray, size: int) -> np.ndarray:
    """Cells as squares of pixels; sizes that cells do not divide take the nearest cell."""
    rows = np.arange(size) * grid.shape[1] // size
    return grid[:, rows][:, :, rows]


def assemble(names: Sequence[str], columns: Sequence[np.ndarray]) -> Image.Image:
    """Columns of pictures, each under its name, on as many lines as the longest needs."""
    step, rows = CELL + GAP, len(columns[0])
    texts = ["\n".join(textwrap.wrap(name, 17)) for name in names]
    header = HEADER + LINE * max(text.count("\n") for text in texts)
    sheet = Image.new("RGB", (GAP + step * len(columns), header + step * rows), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, (text, pictures) in enumerate(zip(texts, columns, strict=True)):
        middle = (GAP + step * column + CELL / 2, header / 2)
        pen.text(middle, text, fill="black", font=font, anchor="mm", align="center")
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
            enlarge = Image.Resampling.LANCZOS if tile.width > CELL else Image.Resampling.NEAREST
            sheet.paste(tile.resize((CELL, CELL), enlarge), (GAP + step * column, header + step * row))
    return sheet
