"""Images of our own with known parts, for a machine that has no others: four-legged figures on rough ground."""

import colorsys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from partlearn.config import TRUTH, ExtractConfig
from partlearn.labelling.shard import build_shard
from partlearn.labelling.sources import FromImages
from partlearn.labelling.truth import TruthLabeller, truth_beside
from shards.build import finalise, open_plan, shard_done
from shards.images import list_images
from training.config import RunConfig

KINDS, WIDTH, HEIGHT = 8, 400, 320
BODY, HEAD, LEGS, TAIL = 1, 2, 3, 4
ROUGH = 16
"""Deviation of the pixels' noise: a square of 224 px then takes about 18 KB as JPEG, as a photograph's does."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Where the drawings lie."""

    folder: Path
    """images/KIND/NAME.jpg beside labels/KIND/NAME.png."""
    shards: Path
    """The same, squared, with their true parts as labels."""


def drawn(out: Path, *, count: int, size: int, cores: int) -> Drawn:
    """Draw `count` images and write their shard set of `size` pixels; once, and later only what is missing."""
    made = Drawn(out / "drawn", out / f"drawn-shards-{size}")
    complete = made.folder / "complete"
    if not complete.is_file():
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda number: _write(made.folder, number), range(count)))
        complete.write_text(f"{count}\n")
    if not (made.shards / "dataset.json").is_file():
        _write_shards(made, size, cores)
    return made


def draw(number: int) -> tuple[Image.Image, Image.Image]:
    """Image `number` and the part id of each of its pixels: a pure function of the number, whose kind is
    `number % KINDS`. Kinds differ in the colour of their parts and in the length of their legs."""
    kind, random = number % KINDS, np.random.default_rng(number)
    labels = Image.new("L", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(labels)
    size, facing = random.uniform(45, 75), random.choice([-1, 1])
    x, y = random.uniform(0.3, 0.7) * WIDTH, random.uniform(0.35, 0.6) * HEIGHT
    legs = size * (0.9 if kind % 2 else 1.5)
    for place in (-0.8, -0.4, 0.4, 0.8):
        pen.line([(x + place * size, y), (x + place * size + random.normal(0, 6), y + legs)], LEGS, round(size / 5))
    pen.line([(x - facing * size, y), (x - facing * 1.9 * size, y - random.uniform(0.1, 0.7) * size)], TAIL, 9)
    pen.ellipse([x - 1.1 * size, y - 0.5 * size, x + 1.1 * size, y + 0.5 * size], BODY)
    head = x + facing * 1.2 * size
    pen.ellipse([head - 0.4 * size, y - 0.9 * size, head + 0.4 * size, y - 0.1 * size], HEAD)
    ids = np.asarray(labels)
    return Image.fromarray(_coloured(ids, kind, random)), labels


def _coloured(ids: np.ndarray, kind: int, random: np.random.Generator) -> np.ndarray:
    """Blotches of earth and sky, the parts in the kind's colours, and noise over all."""
    ground = random.uniform(60, 200, (5, 6, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(ground).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.float32)
    for part in (BODY, HEAD, LEGS, TAIL):
        hue = (kind / KINDS + part / 7 + random.normal(0, 0.02)) % 1
        colour = colorsys.hsv_to_rgb(hue, random.uniform(0.5, 0.9), random.uniform(0.5, 0.95))
        pixels[ids == part] = 255 * np.array(colour)
    pixels += random.normal(0, ROUGH, (HEIGHT, WIDTH, 1)).astype(np.float32)
    return pixels.clip(0, 255).astype(np.uint8)


def _write(folder: Path, number: int) -> None:
    image, labels = draw(number)
    for kept, what, suffix in ((image, "images", "jpg"), (labels, "labels", "png")):
        path = folder / what / f"kind{number % KINDS}" / f"{number:05d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept.save(path, quality=90)


def source_of(config: ExtractConfig) -> FromImages:
    """The images of a config, as `extract` reads them."""
    return FromImages(
        list_images(config.images or ""),
        size=config.size,
        quality=config.quality,
        samples_per_shard=config.samples_per_shard,
        seed=config.seed,
    )


def _write_shards(made: Drawn, size: int, cores: int) -> None:
    config = ExtractConfig(
        images=str(made.folder),
        parts=Path(TRUTH),
        size=size,
        samples_per_shard=128,
        run=RunConfig(out=made.shards, threads=cores),
    )
    source = source_of(config)
    labeller = TruthLabeller(truth_beside(source), source.names, grid=28)
    made.shards.mkdir(parents=True, exist_ok=True)
    digest = open_plan(made.shards, {"drawn": len(source.images), "size": size})
    for number in range(len(source.shard_sizes)):
        if not shard_done(made.shards, number, digest):
            build_shard(source.slice(number), labeller=labeller, config=config, plan_digest=digest)
    info = {"grid": 28, "groups": labeller.groups, "size": size, "classes": list(source.classes)}
    finalise(
        made.shards, shard_count=len(source.shard_sizes), plan_digest=digest, info=info | {"inputs": source.inputs}
    )
