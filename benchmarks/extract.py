"""How much of labelling is spent outside the models: whole shards, built as `extract --backend local` builds them.

A block is one build: images read, squared, stored, labelled and committed, which takes as long as the models take.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.prepared import some_images
from benchmarks.quiet import Meter
from benchmarks.rounds import PLENTY, Block, Report, gate_in_words, summary
from partlearn.config import ExtractConfig, LearnConfig
from partlearn.labelling.learned import TokenLabeller, open_token_labeller
from partlearn.labelling.shard import build_shard
from partlearn.labelling.sources import FromImages, Stored
from partlearn.labelling.stored_labels import Labels
from partlearn.train import learn
from shards.images import ImageList, read_bytes
from training.config import RunConfig
from training.device import pick_device
from training.progress import Progress

BARS = {"share_outside_models": ("<=", 0.15)}
UNTRAINED, UNTRAINED_GRID, FEW = "random:vit_small_patch16_224", 14, 8


class TimedLabeller(TokenLabeller):
    """A labeller that knows how long it has worked. Its answers are on the host, so an accelerator has finished."""

    seconds = 0.0

    @classmethod
    def of_parts(cls, parts: Path, **options: Any) -> "TimedLabeller":
        opened = open_token_labeller(parts, **options)
        return cls(opened.encoder, opened.learner, opened.sha256)

    def label(self, batch: Sequence[Stored]) -> Labels:
        began = time.perf_counter()
        try:
            return super().label(batch)
        finally:
            self.seconds += time.perf_counter() - began


def bench_extract(
    images: str, *, parts: Path | None, out: Path, minutes: float, most: int, build: int, run: RunConfig
) -> Report:
    """Measure builds of `build` images each, out of at most `most`, until enough are quiet or `minutes` are over.

    Args:
        parts: Run folder of a part learner; None learns an untrained one, on random features, for its speed alone.
        run: Device, precision and threads; its folder is not used.

    Raises:
        FileNotFoundError: There are no such images.
        CheckpointError: The part learner or its encoder cannot be loaded.
    """
    listed = some_images(images, most)
    out.mkdir(parents=True, exist_ok=True)
    labeller = TimedLabeller.of_parts(
        parts or untrained_parts(listed, out, run), device=pick_device(run.device), precision=run.precision
    )
    with tempfile.TemporaryDirectory(prefix="extract.", dir=out) as folder:
        config = ExtractConfig(
            images=images,
            parts=parts or out,
            samples_per_shard=build,
            batch_size=min(64, max(1, build // 4)),
            backend="local",
            run=dataclasses.replace(run, out=Path(folder)),
        )
        source = FromImages(listed, size=config.size, quality=config.quality, samples_per_shard=build, seed=config.seed)
        speed, inside, outside = _builds(source, labeller, config, minutes)
    rows = [
        summary("images_per_second", "images/s", speed),
        summary("seconds_in_models", "s/image", inside),
        summary("share_outside_models", "share", outside),
    ]
    encoder = labeller.encoder.description["source"]
    caption = (
        f"builds of {min(build, len(listed.images))} images, {config.batch_size} at once, labelled by {encoder} "
        f"on a grid of {labeller.grid} on {pick_device(run.device)}, {run.threads} threads. {gate_in_words()}"
    )
    return Report(rows, BARS, caption)


def _builds(
    source: FromImages, labeller: TimedLabeller, config: ExtractConfig, minutes: float
) -> tuple[list[Block], list[Block], list[Block]]:
    """Of every build but the first: images a second, model seconds an image, share outside the models."""
    speed: list[Block] = []
    inside: list[Block] = []
    outside: list[Block] = []
    ends = time.monotonic() + 60 * minutes
    shards = max(1, len(source.images) // config.samples_per_shard)
    progress, built = Progress(PLENTY, "bench extract", "quiet builds"), 0
    while not speed or (sum(block.quiet for block in speed) < PLENTY and time.monotonic() < ends):
        labeller.seconds = 0.0
        with Meter() as meter:
            told = build_shard(source.slice(built % shards), labeller=labeller, config=config, plan_digest="bench")
        built += 1
        if built == 1:
            continue
        count = told["samples"] + len(told["rejected"])
        speed.append(Block(count / meter.wall, meter.foreign))
        inside.append(Block(labeller.seconds / count, meter.foreign))
        outside.append(Block(1 - labeller.seconds / meter.wall, meter.foreign))
        progress.advance(int(speed[-1].quiet), builds=len(speed))
    progress.close(builds=len(speed))
    return speed, inside, outside


def untrained_parts(
    images: ImageList, out: Path, run: RunConfig, *, encoder: str = UNTRAINED, grid: int = UNTRAINED_GRID
) -> Path:
    """Parts nobody should look at, of two steps on a random ViT: as slow as real ones. Returns their run folder."""
    folder, photos = out / "untrained-parts", out / "untrained-images"
    photos.mkdir(exist_ok=True)
    for number, image in enumerate(images.images[:FEW]):
        (photos / f"{number}{Path(image.name).suffix}").write_bytes(read_bytes(image))
    learn(
        LearnConfig(
            images=str(photos),
            encoder=encoder,
            grid=grid,
            crops=1,
            steps=2,
            batch_size=4,
            run=dataclasses.replace(run, out=folder),
        )
    )
    return folder
