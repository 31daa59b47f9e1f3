"""The question that CPUs could not settle: do parts get better where the learner is trained, for as long as fits?

Beside the default (k-means, no step) stand the same start trained on tokens, and the paper's literal form. None sees a
label. A folder is scored by its truth; learned from is the folder `train` beside it where there is one, and else every
second image, and the others are scored.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_gpu.against_cpu import SIZE, drawings
from benchmarks.on_gpu.case import Bars, Bench, Case, Unfinished
from benchmarks.on_gpu.timing import peak_memory, seconds_of
from benchmarks.prepared import some_images
from benchmarks.rounds import Row, exact
from encoders.load import load_encoder
from evaluate.parts.score import control_rows, score_labellers
from evaluate.parts.views import TruthSet
from partlearn.config import LearnConfig
from partlearn.crops import TokenCrops
from partlearn.initialise import start
from partlearn.labelling.learned import open_token_labeller
from partlearn.train import PartLearning, learn, new_learner, new_optimizer, parts_loss
from shards.atomic import read_json
from shards.images import list_images
from training.config import RunConfig
from training.update import update

BARS: Bars = {}
METHODS: dict[str, dict[str, Any]] = {
    "default, no step": {"steps": 0},
    "k-means, then tokens": {"target": "features"},
    "--paper": {"paper": True},
}
SHOWN = {"foreground_ap": "AP", "beyond_shortcut": "b1", "beyond_other": "b2", "nmi": "NMI", "speckle": "speckle"}
FEWEST, MOST = 200, 20_000
"""Steps of a training run; of fewer nothing could be concluded."""
SCORED = 100
"""Most images of a folder that are scored, evenly spaced."""
SCORE_S, START_S = 0.08, 4.0
"""Guesses: seconds to score an image, and to load and start."""


def cases(bench: Bench) -> list[Case]:
    trained = len(METHODS) - 1
    share = {name: 1 / (trained - place) for place, name in enumerate(list(METHODS)[1:])}
    return [
        Case("controls", partial(_controls, bench), seconds=5),
        *(Case(name, partial(_method, bench, name, share.get(name, 0.0)), seconds=15) for name in METHODS),
    ]


def halves(bench: Bench) -> tuple[Path, dict[str, Path]]:
    """A list of the images to learn from, and of each folder the images to score beside their truth."""
    learned, scored = [], {}
    for folder in bench.photographs or (drawings(bench).folder,):
        folder, files = folder.absolute(), images_in(folder)
        train = folder.parent / "train"
        apart = train != folder and (train / "images").is_dir()
        learned += images_in(train) if apart else files[0::2]
        others = files if apart else files[1::2]
        name = "/".join(folder.parts[-2:]) if bench.photographs else "drawn"
        scored[name] = bench.out / "scored" / name
        truth = "labels" if (folder / "labels").is_dir() else "masks"
        for file in others[:: -(-len(others) // SCORED)]:
            inside = file.relative_to(folder / "images")
            for one in (Path("images") / inside, Path(truth) / inside.with_suffix(".png")):
                link = scored[name] / one
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(folder / one)
    listed = bench.out / "learned.txt"
    listed.write_text("".join(f"{file}\n" for file in learned))
    return listed, scored


def images_in(folder: Path) -> list[Path]:
    return sorted(Path(image.location).absolute() for image in list_images(folder).images)


def config_of(bench: Bench, name: str, images: Path, steps: int) -> LearnConfig:
    toy: dict[str, Any] = {"grid": 7, "batch_size": 4, "crops": 1} if bench.rehearse else {}
    run = RunConfig(out=bench.out / "parts" / name, device=bench.device, threads=bench.cores, checkpoint_minutes=0.25)
    settings: dict[str, Any] = {"steps": steps} | METHODS[name] | toy
    return LearnConfig(images=str(images), encoder=bench.encoder, run=run, **settings)


def _method(bench: Bench, name: str, share: float) -> Iterator[Row]:
    """Learn, and score; `share` of the time left is for the training."""
    images, sets = halves(bench)
    scoring = START_S + SCORE_S * sum(len(list_images(folder).images) for folder in sets.values())
    config = config_of(bench, name, images, 1)
    if config.updates:
        begun = config.run.out / "config.json"  # by an earlier call: a folder belongs to one config
        steps = read_json(begun)["steps"] if begun.is_file() else _steps_that_fit(bench, config, share, scoring)
        config = config_of(bench, name, images, steps)
        yield exact("steps", steps, "steps", 1)
    began = time.perf_counter()
    learn(config)
    yield exact("learning, this call", time.perf_counter() - began, "s", 1)
    yield from peak_memory(bench.device)
    if bench.left() < scoring:
        raise Unfinished("learned; its scores are left for the next call")
    labeller = open_token_labeller(config.run.out, device=torch.device(bench.device))
    for set_, folder in sets.items():
        truths = TruthSet(folder)
        rows = score_labellers([labeller], truths, size=SIZE, advance=lambda count: None)[0][0]
        yield from _rows(set_, rows[-1], rows[-1]["images"])


def _rows(name: str, scores: dict[str, Any], images: int) -> Iterator[Row]:
    for column, shown in SHOWN.items():
        if scores[column] is not None:
            yield exact(f"{name} {shown}", scores[column], "", images)


def _steps_that_fit(bench: Bench, config: LearnConfig, share: float, scoring: float) -> int:
    """How many updates fit into a share of the time left, less scoring: by a look at the first ones on a few images.

    Raises:
        Unfinished: Too few to conclude anything from.
    """
    encoder = load_encoder(
        config.encoder, grid=config.grid, block=config.encoder_block, device=torch.device(bench.device)
    )
    learner = new_learner(config, encoder).to(encoder.device)
    optimizer = new_optimizer(learner, config)
    views = TokenCrops(config, encoder, some_images(config.images, config.batch_size))
    began = time.perf_counter()
    start(learner, config, encoder, views)
    with closing(views.batches(step=0)) as batches:
        next(batches)
        encoding = (time.perf_counter() - began) / views.count  # k-means and first-time costs with it
        taken = seconds_of(
            lambda: update(
                optimizer,
                [parts_loss(learner, config, encoder, next(batches))[0]],
                largest_norm=PartLearning.largest_norm,
            ),
            device=bench.device,
            seconds=bench.measuring(1.0),
        )
    step = sorted(taken)[len(taken) // 2]
    whole = encoding * max(1, config.kept_crops) * len(list_images(config.images).images)
    fit = int(0.85 * (share * bench.left() - scoring - whole) / step)
    if bench.rehearse:
        return 2
    if fit < FEWEST:
        raise Unfinished(f"{max(0, fit)} steps fit, and {FEWEST} are needed; give it more --minutes")
    return min(MOST, fit)


def _controls(bench: Bench) -> Iterator[Row]:
    """What position and colour alone score on the same images."""
    for set_, folder in halves(bench)[1].items():
        grid = config_of(bench, "default, no step", folder, 0).grid
        rows = control_rows(TruthSet(folder), size=SIZE, grid=grid, counts=(6,))
        for row in rows:
            if row["view"] == rows[-1]["view"]:
                yield from _rows(f"{set_} {row['method']}", row, row["images"])
