"""The verb `demo`: every stage of the job, small, each in a run folder of its own that a second call reuses."""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from encoders.distill.config import EncoderConfig
from encoders.distill.train import distill
from evaluate.config import KnnConfig, ProbeConfig
from evaluate.knn import knn
from evaluate.linear import probe
from evaluate.parts.stored import score_against_truth
from partlearn.config import ExtractConfig, LearnConfig
from partlearn.train import learn
from pipeline.config import DemoConfig
from pipeline.creatures import write_creatures
from pipeline.extract import extract
from pipeline.figures.pretrain_sheet import draw_sheet
from pretrain.config import PretrainConfig, StreamRun
from pretrain.train import pretrain
from shards.atomic import read_json, write_json
from shards.images import list_images
from shards.places import refuse_unwritable
from shards.shard_set import ShardSet
from training.config import RunConfig
from training.progress import duration

IMAGES, HELD_OUT, SIDE, PATCH = 2000, 400, 96, 8
GRID = SIDE // PATCH
PHOTO_SIDE = 112
"""Of the squares stored of one's own images: 14 patches a side, which divide the 28 cells of the parts that come with
the project."""
SHORT = {
    "foreground_ap": "AP",
    "foreground_recall_quarter": "recall",
    "nmi": "NMI",
    "ari": "ARI",
    "beyond_shortcut": "beyond",
    "colour_nmi": "colour",
    "bands_nmi": "bands",
}


@dataclass(frozen=True, slots=True)
class Job:
    """Every config of the demo; the settings were chosen for ten minutes on two cores (docs/log.md)."""

    config: DemoConfig
    images: str

    def run(self, name: str) -> RunConfig:
        return RunConfig(out=self.config.out / name, device=self.config.device)

    def encoder(self, *, trained: bool) -> EncoderConfig:
        return EncoderConfig(
            images=self.images,
            size=64,
            local_size=32,
            local_crops=2,
            patch=PATCH,
            embed_dim=128,
            depth=4,
            heads=4,
            prototypes=256,
            epochs=6 if trained else 0,
            batch_size=32,
            base_lr=8e-3,
            warmup_epochs=0.5,
            teacher_momentum=0.99,
            seed=self.config.seed,
            run=self.run("encoder" if trained else "encoder-untrained"),
        )

    def parts(self, encoder: EncoderConfig, name: str) -> LearnConfig:
        return LearnConfig(
            images=self.images,
            encoder=f"run:{encoder.run.out}",
            encoder_block=2,
            grid=GRID,
            crops=1,
            batch_size=64,
            seed=self.config.seed,
            run=self.run(name),
        )

    def shards(self, images: str | None, parts: Path, name: str) -> ExtractConfig:
        return ExtractConfig(
            images=images,
            parts=parts,
            size=SIDE if self.config.images is None else PHOTO_SIDE,
            samples_per_shard=512,
            backend="local",
            seed=self.config.seed,
            run=self.run(name),
        )

    def pretraining(self, name: str, *, masking: Literal["random", "semmae"], epochs: int) -> PretrainConfig:
        return PretrainConfig(
            data=str(self.config.out / "shards"),
            masking=masking,
            patch=PATCH,
            embed_dim=128,
            depth=4,
            heads=4,
            decoder_dim=64,
            decoder_depth=1,
            decoder_heads=4,
            epochs=epochs,
            warmup_epochs=2 if epochs else 0,
            batch_size=64,
            base_lr=4e-3,
            seed=self.config.seed,
            run=StreamRun(out=self.config.out / name, device=self.config.device),
        )


def demo(config: DemoConfig) -> None:
    """Run what is missing of the whole job in `config.out`, then print its table and draw its image sheet."""
    began = time.monotonic()
    refuse_unwritable(config.out)
    procedural = config.images is None
    images = config.out / "images"
    if procedural:
        _step("drawing", "creatures, with true parts", lambda: _draw(images, config.seed))
    job = Job(config, str(images / "train") if procedural else str(config.images))
    classes = list_images(job.images).classes

    parts = _learn_parts(job) if procedural else Path("builtin")  # encoders/builtin/README.md
    _step(
        "shards",
        "labels beside every image",
        lambda: extract(job.shards(job.images, parts, "shards")),
    )
    epochs = _epochs(len(ShardSet.open(config.out / "shards")))
    runs = {
        "untrained": job.pretraining("untrained", masking="random", epochs=0),
        "random masking": job.pretraining("random", masking="random", epochs=epochs),
        "semantic masking": job.pretraining("semmae", masking="semmae", epochs=epochs),
    }
    for name, pretraining in runs.items():
        _step("pretrain", name, lambda pretraining=pretraining: pretrain(pretraining))

    if procedural:
        val = job.shards(str(images / "val"), parts, "shards-val")
        _step("shards", "labels of the held-out images", lambda: extract(val))
        _print_parts(job, images, val)
    _print_accuracy(config, runs, classes, procedural)
    sheet = draw_sheet(
        config.out / "sheet.png",
        shards=ShardSet.open(config.out / ("shards-val" if procedural else "shards")),
        run=runs["semantic masking"].run.out,
        seed=config.seed,
    )
    print(f"image sheet: {sheet}\nall of it in {duration(time.monotonic() - began)}; everything is in {config.out}")


def _learn_parts(job: Job) -> Path:
    """On drawings, which no photograph prepares for."""
    encoder = job.encoder(trained=True)
    _step("encoder", "a small ViT by self-distillation", lambda: distill(encoder))
    parts = job.parts(encoder, "parts")
    _step("parts", "six parts and the background from its tokens", lambda: learn(parts))
    return parts.run.out


def _draw(images: Path, seed: int) -> None:
    write_creatures(images / "train", count=IMAGES, seed=seed, size=SIDE)
    write_creatures(images / "val", count=HELD_OUT, seed=seed + 1_000, size=SIDE)


def _epochs(count: int) -> int:
    """Passes that take the pretrainings of the demo about as long on any set: 28,000 images, at least one pass."""
    return max(1, round(28_000 / count))


def _step(name: str, what: str, work: Callable[[], Any]) -> None:
    began = time.monotonic()
    print(f"{name:9} {what} ...", file=sys.stderr, flush=True)
    work()
    print(f"{name:9} {what}: {duration(time.monotonic() - began)}", file=sys.stderr, flush=True)


def _print_parts(job: Job, images: Path, val: ExtractConfig) -> None:
    """Labels against the truth, beside shortcuts and the same learner on an untrained encoder."""
    untrained = job.encoder(trained=False)
    parts = job.parts(untrained, "parts-untrained")
    control = job.shards(val.images, parts.run.out, "shards-val-untrained")
    _step(
        "control",
        "the same learner on an untrained encoder",
        lambda: (distill(untrained), learn(parts), extract(control)),
    )
    rows = score_against_truth(
        {
            "learned parts": ShardSet.open(val.run.out),
            "same, untrained encoder": ShardSet.open(control.run.out),
        },
        truth=images / "val",
    )
    write_json(job.config.out / "parts.json", rows)
    table = Table("", *SHORT.values(), title=f"parts and foreground against the truth, {HELD_OUT} held-out images")
    for row in rows:
        table.add_row(row["method"], *("" if row[c] is None else f"{row[c]:.3f}" for c in SHORT))
    Console().print(table)
    print(
        "AP and recall (in the kept quarter): the foreground rank. NMI, ARI: parts inside the true foreground. beyond: "
        "what parts know\nbeside position and colour. An encoder trained for two minutes finds little."
    )


def _print_accuracy(
    config: DemoConfig, runs: dict[str, PretrainConfig], classes: tuple[str, ...], procedural: bool
) -> None:
    if not classes:
        print("no class folders in these images, so no k-NN and no probe")
        return
    table = Table(
        "encoder",
        "k-NN",
        "linear probe",
        title=f"accuracy over {len(classes)} classes, mean of patch tokens; one seed, so no ranking",
    )
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        found = _accuracy(config, run.run.out, config.out / "shards-val" if procedural else None)
        table.add_row(name, *(f"{row['value']:.1f} %" for row in found if row["metric"] == "top1"))
        rows += found
    write_json(config.out / "accuracy.json", rows)
    Console().print(table)


def _accuracy(config: DemoConfig, run: Path, val: Path | None) -> list[dict[str, Any]]:
    """Rows of k-NN and probe of one run, computed once."""
    kept = config.out / f"accuracy-{run.name}.json"
    if not kept.is_file():
        data, val_data = str(config.out / "shards"), str(val or "")
        rows = [
            *knn(KnnConfig(checkpoint=str(run), data=data, val_data=val_data, pool="mean", seed=config.seed)),
            *probe(ProbeConfig(checkpoint=str(run), data=data, val_data=val_data, pool="mean", seed=config.seed)),
        ]
        write_json(kept, [dataclasses.asdict(row) for row in rows])
    return read_json(kept)
