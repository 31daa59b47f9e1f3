"""One slice of pictures in, one labelled shard out. No Ray here: `pipeline/extract.py` calls it from wherever."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from partlearn.config import ExtractConfig
from partlearn.label import Labeller
from shards.order import permutation
from shards.pictures import Picture, PictureError, PictureList, decode_rgb, read_bytes, square
from shards.sample import LabelledPicture, Rejected
from shards.writer import write_shard


@dataclass(frozen=True, slots=True)
class Stored:
    """A picture as the shard will hold it, and its pixels as any reader will decode them."""

    ordinal: int
    picture: Picture
    jpeg: bytes
    pixels: np.ndarray
    source_size: tuple[int, int]
    box: tuple[float, float, float, float]


def shard_count(count: int, config: ExtractConfig) -> int:
    """Shards of a set of `count` inputs."""
    return -(-count // config.samples_per_shard)


def build_shard(
    number: int, *, pictures: PictureList, labeller: Labeller, config: ExtractConfig, plan_digest: str
) -> dict[str, Any]:
    """Label slice `number` of the seeded permutation of the inputs and commit it as one shard.

    A pure function of its arguments, down to the bytes. Labels are computed on the stored JPEG's own pixels.
    Unreadable pictures are listed in the sidecar with their reason; none is lost in silence.
    """
    order = permutation(len(pictures.pictures), seed=config.seed, epoch=0)
    first = number * config.samples_per_shard
    slots = range(first, min(first + config.samples_per_shard, len(order)))
    rejected: list[Rejected] = []

    def labelled() -> Iterator[LabelledPicture]:
        with ThreadPoolExecutor(config.run.threads) as pool:
            waiting = _submit(pool, slots[: config.batch_size], order, pictures, config)
            for start in range(0, len(slots), config.batch_size):
                ahead = slots[start + config.batch_size : start + 2 * config.batch_size]
                following = _submit(pool, ahead, order, pictures, config)
                outcomes = [future.result() for future in waiting]
                rejected.extend(outcome for outcome in outcomes if isinstance(outcome, Rejected))
                yield from _label([outcome for outcome in outcomes if isinstance(outcome, Stored)], labeller)
                waiting = following

    return write_shard(
        Path(config.run.out),
        number,
        labelled(),
        groups=labeller.groups,
        plan_digest=plan_digest,
        rejected=rejected,
    )


def _submit(pool: ThreadPoolExecutor, slots: range, order: np.ndarray, pictures: PictureList, config: ExtractConfig):
    return [pool.submit(_store, slot, pictures.pictures[int(order[slot])], config) for slot in slots]


def _store(ordinal: int, picture: Picture, config: ExtractConfig) -> Stored | Rejected:
    """Decode, square, and encode as the shard will hold it; or the reason why not."""
    try:
        data = read_bytes(picture)
    except OSError as error:
        return Rejected(source=picture.name, ordinal=ordinal, stage="read", reason=str(error))
    try:
        image = decode_rgb(data)
    except PictureError as error:
        return Rejected(source=picture.name, ordinal=ordinal, stage="decode", reason=str(error))
    cropped, box = square(image, config.size)
    buffer = io.BytesIO()
    cropped.save(buffer, "JPEG", quality=config.quality, subsampling="4:2:0")
    with Image.open(buffer) as stored:
        pixels = np.asarray(stored)
    return Stored(ordinal, picture, buffer.getvalue(), pixels, image.size, box)


def _label(batch: list[Stored], labeller: Labeller) -> Iterator[LabelledPicture]:
    if not batch:
        return
    parts, fgrank = labeller(np.stack([stored.pixels for stored in batch]))
    for stored, part, rank in zip(batch, parts, fgrank, strict=True):
        yield LabelledPicture(
            key=f"{stored.ordinal:08d}",
            source=stored.picture.name,
            class_id=stored.picture.class_id,
            jpeg=stored.jpeg,
            parts=part,
            fgrank=rank,
            src_width=stored.source_size[0],
            src_height=stored.source_size[1],
            box=stored.box,
        )
