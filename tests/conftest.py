"""Small real things that several tests need."""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partlearn.config import LearnConfig
from partlearn.learn import learn
from shards.dataset import finalise, open_plan
from shards.sample import LabelledPicture
from shards.shard_set import ShardSet
from shards.writer import write_shard
from training.config import RunConfig


def drawn(count: int, size: int, grid: int, groups: int, classes: int, seed: int) -> Iterator[LabelledPicture]:
    """Pictures of noise in a class's colour, with random labels and ranks."""
    random = np.random.default_rng(seed)
    for number in range(count):
        class_id = number % classes if classes else -1
        pixels = random.integers(0, 120, (size, size, 3)) + np.array([40 * max(0, class_id), 60, 0])
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        yield LabelledPicture(
            key=f"{number:08d}",
            source=f"{class_id}/{number}.jpg",
            class_id=class_id,
            jpeg=buffer.getvalue(),
            parts=random.integers(0, groups, (grid, grid)).astype(np.uint8),
            fgrank=random.permutation(grid * grid).astype(np.uint16).reshape(grid, grid),
            src_width=size,
            src_height=size,
            box=(0.0, 0.0, float(size), float(size)),
        )


def write_set(folder: Path, *, count=40, size=32, grid=4, groups=4, classes=3, samples_per_shard=16, seed=0) -> Path:
    """A finished shard set, through the real writer."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = open_plan(folder, {"seed": seed, "inputs": count})
    samples = list(drawn(count, size, grid, groups, classes, seed))
    shards = -(-count // samples_per_shard)
    for number in range(shards):
        slice_ = samples[number * samples_per_shard : (number + 1) * samples_per_shard]
        write_shard(folder, number, slice_, groups=groups, plan_digest=digest, rejected=[])
    info = {
        "grid": grid,
        "groups": groups,
        "size": size,
        "classes": [f"class{number}" for number in range(classes)],
        "inputs": {"count": count},
    }
    finalise(folder, shard_count=shards, plan_digest=digest, info=info)
    return folder


@pytest.fixture
def make_shards(tmp_path) -> Callable[..., ShardSet]:
    """A function that writes a shard set and opens it."""
    made = []

    def make(name: str = "shards", **settings) -> ShardSet:
        made.append(ShardSet.open(write_set(tmp_path / name, **settings)))
        return made[-1]

    yield make
    for shards in made:
        shards.close()


def photographs(folder: Path, count: int) -> Path:
    """A folder of small JPEGs of coloured blobs."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 255, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(folder / f"{number:03d}.jpg")
    return folder


def small_parts(run: Path) -> Path:
    """A part learner of two steps on random features: poor parts, real machinery."""
    run.mkdir()
    config = LearnConfig(
        images=str(photographs(run / "photos", 6)),
        encoder="random:vit_tiny_patch16_224",
        grid=4,
        parts=3,
        views=1,
        steps=2,
        batch_size=4,
        run=RunConfig(out=run / "run", device="cpu", precision="fp32"),
    )
    learn(config)
    return run / "run"


def tars(out: Path) -> dict[str, str]:
    """SHA-256 of every tar and of the merged index."""
    files = [*sorted((out / "shards").glob("*.tar")), out / "index.parquet"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
