"""The same images four times: files in class folders, a shard set with stub labels, an index of ImageNet's length, and
as many small shards as ImageNet makes."""

import dataclasses
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from shards.atomic import read_json, sha256_file, sha256_json, write_json, write_whole
from shards.build import finalise, open_plan
from shards.decode import ImageError, decode_square
from shards.images import ImageFile, ImageList, list_images, read_bytes
from shards.index import merged, table_bytes
from shards.info import FORMAT, VERSION, fingerprint
from shards.sample import LabelledImage, Rejected, Sample
from shards.shard_set import ShardSet
from shards.writer import shard_paths, write_shard
from training.progress import Progress

SIZE, QUALITY, GRID, GROUPS, PER_SHARD = 224, 90, 28, 7, 2048
IMAGENET = 1_281_167
IMAGENET_SHARDS = -(-IMAGENET // PER_SHARD)
PER_SMALL_SHARD = 4


@dataclass(frozen=True, slots=True)
class Prepared:
    """Where the images lie."""

    originals: Path
    """Class folders, as torchvision's ImageFolder wants them: the bytes as they came."""
    shards: Path
    many: Path
    """The same shards behind an index of as many samples as ImageNet has."""
    small: Path
    """The same samples, over and over, in as many shards as ImageNet makes: more than are kept open."""


def some_images(images: str, most: int) -> ImageList:
    """The images of a source, or `most` of them, evenly spaced."""
    listed = list_images(images)
    count = len(listed.images)
    chosen = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    return dataclasses.replace(listed, images=tuple(listed.images[index] for index in chosen))


def prepare(images: str, out: Path, *, most: int) -> Prepared:
    """Make what `bench loader` reads, under `out`; once, and again only what a kill left undone.

    Raises:
        FileNotFoundError: There are no such images.
        ShardError: None of them can be read.
    """
    listed = some_images(images, most)
    plan = {
        "source": str(Path(images).resolve()),
        "inputs_sha256": listed.digest,
        "settings": [SIZE, QUALITY, GRID, GROUPS, PER_SHARD],
    }
    folder = out / f"loader-{sha256_json(plan)[:12]}"
    made = Prepared(folder / "originals", folder / "shards", folder / "many", folder / "small")
    if not (made.shards / "dataset.json").is_file():
        made.shards.mkdir(parents=True, exist_ok=True)
        _write_set(listed, made, plan)
    if not (made.many / "dataset.json").is_file():
        _write_many(made)
    if not (made.small / "dataset.json").is_file():
        _write_small(made)
    return made


def _write_set(images: ImageList, made: Prepared, plan: dict) -> None:
    digest = open_plan(made.shards, plan)
    count = len(images.images)
    progress = Progress(count, "preparing", "images")
    starts = range(0, count, PER_SHARD)
    for number, start in enumerate(starts):
        rejected: list[Rejected] = []
        mine = images.images[start : start + PER_SHARD]
        samples = _stored(mine, start, made.originals, rejected, progress)
        write_shard(made.shards, number, samples, groups=GROUPS, plan_digest=digest, rejected=rejected)
    progress.close()
    info = {"grid": GRID, "groups": GROUPS, "size": SIZE, "classes": list(images.classes), "inputs": {"count": count}}
    finalise(made.shards, shard_count=len(starts), plan_digest=digest, info=info)


def _stored(
    images: tuple[ImageFile, ...], first: int, originals: Path, rejected: list[Rejected], progress: Progress
) -> Iterator[LabelledImage]:
    """Squared, encoded, and labelled with noise; each one's original is laid into its class folder on the way."""
    for ordinal, file in enumerate(images, start=first):
        progress.advance()
        try:
            data = read_bytes(file)
            cropped, box, (width, height) = decode_square(data, SIZE)
        except (OSError, ImageError) as error:
            rejected.append(Rejected(source=file.name, ordinal=ordinal, step="decode", reason=str(error)))
            continue
        _lay_down(file, data, originals, ordinal)
        buffer = io.BytesIO()
        cropped.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
        noise = np.random.default_rng(ordinal)
        yield LabelledImage(
            key=f"{ordinal:08d}",
            source=file.name,
            class_id=file.class_id,
            jpeg=buffer.getvalue(),
            parts=noise.integers(0, GROUPS, (GRID, GRID)).astype(np.uint8),
            fgrank=noise.permutation(GRID * GRID).astype(np.uint16).reshape(GRID, GRID),
            src_width=width,
            src_height=height,
            box=box,
        )


def _lay_down(image: ImageFile, data: bytes, originals: Path, ordinal: int) -> None:
    folder = originals / (f"{image.class_id:04d}" if image.class_id >= 0 else "all")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{ordinal:08d}{Path(image.name).suffix}").write_bytes(data)


def _write_many(made: Prepared) -> None:
    """A set of ImageNet's length whose samples are those of `made.shards`, over and over; only good for seeking."""
    made.many.mkdir(exist_ok=True)
    (made.many / "shards").unlink(missing_ok=True)
    (made.many / "shards").symlink_to(made.shards.resolve() / "shards")
    table = pq.read_table(made.shards / "index.parquet")
    table = table.take(np.arange(IMAGENET) % table.num_rows)
    pq.write_table(table, made.many / "index.parquet", compression="zstd")
    info = read_json(made.shards / "dataset.json")
    *others, last = info["shards"]
    filled = last | {"samples": last["samples"] + IMAGENET - info["samples"]}
    digest = sha256_file(made.many / "index.parquet")
    changed = {"samples": IMAGENET, "shards": [*others, filled], "index_sha256": digest}
    write_json(made.many / "dataset.json", info | changed)


def _write_small(made: Prepared) -> None:
    """One small shard, copied until there are as many as ImageNet makes; only good for reading."""
    made.small.mkdir(exist_ok=True)
    with ShardSet.open(made.shards) as shards:
        info = {name: shards.info[name] for name in ("grid", "groups", "size", "classes")}
        samples = [_again(shards.read(place % len(shards)), place) for place in range(PER_SMALL_SHARD)]
    told = write_shard(made.small, 0, samples, groups=GROUPS, plan_digest="", rejected=[])
    first, index, _ = shard_paths(made.small, 0)
    for number in range(1, IMAGENET_SHARDS):
        shutil.copyfile(first, shard_paths(made.small, number)[0])
    table = merged([pq.read_table(index)] * IMAGENET_SHARDS)
    write_whole(made.small / "index.parquet", table_bytes(table))
    shard = {"samples": PER_SMALL_SHARD} | told["tar"]
    info |= {
        "format": FORMAT,
        "version": VERSION,
        "samples": table.num_rows,
        "shards": [
            shard | {"name": shard_paths(made.small, number)[0].name, "first_index": number * PER_SMALL_SHARD}
            for number in range(IMAGENET_SHARDS)
        ],
        "index_sha256": sha256_file(made.small / "index.parquet"),
    }
    write_json(made.small / "dataset.json", info | {"fingerprint": fingerprint(info)})


def _again(sample: Sample, place: int) -> LabelledImage:
    key, whole = f"{place:08d}", (0.0, 0.0, float(SIZE), float(SIZE))
    return LabelledImage(
        key, key, sample.class_id, sample.jpeg, sample.parts, sample.fgrank, src_width=SIZE, src_height=SIZE, box=whole
    )
