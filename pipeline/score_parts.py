"""The verb `score-parts`: a table of labellers against the truth, with shortcuts in the same table, and a sheet."""

import copy
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from evaluate.parts.metrics import FOREGROUND_COLUMNS, PART_COLUMNS
from evaluate.parts.score import LABELLINGS, below_centre, control_rows, parts_of, score_labellers
from evaluate.parts.stability import stability
from evaluate.parts.views import TruthSet
from partlearn.config import BUILTIN_READS
from partlearn.labelling.baselines import NAMES, OF_HEADS, Baseline
from partlearn.labelling.learned import TokenLabeller, open_token_labeller
from pipeline.config import ScorePartsConfig
from shards.atomic import read_json, sha256_json, write_json, write_whole
from shards.places import refuse_unwritable
from training.contact_sheet import ROWS, png_of, tinted
from training.device import pick_device
from training.progress import Progress

COLUMNS = (*FOREGROUND_COLUMNS[:2], *PART_COLUMNS, "shift_ari", "flip_agreement", "flip_inside")
COLUMNS += FOREGROUND_COLUMNS[2:]
READ_BLOCK = ("kmeans-image", "shuffled-kmeans-image")
"""Baselines to which --encoder-block matters; the others see the encoder's end alone."""
SHOWN = {
    "foreground_ap": "AP", "beyond_shortcut": "b1", "beyond_other": "b2", "nmi": "NMI", "colour_nmi": "RGB",
    "shift_ari": "shift", "flip_inside": "flip", "parts_used": "used", "speckle_inside": "lone", "stability": "seeds",
}  # fmt: skip
"""Columns of the printed table, and their names there; --json has all."""
LEGEND = (
    "AP: rank of the foreground. b1, b2: what labels say about true parts beyond height and colour, with two null "
    "models. NMI: with true parts, all images together. RGB: NMI with clusters of colours. shift, flip, seeds: "
    "agreement of two crops, with the mirror image, and of runs of other seeds. used: parts in an image. lone: cells "
    "that share their label with no neighbour. flip and lone look only where there are parts. --json FILE has more; "
    "partlearn/RESULTS.md says how to read them."
)
ON_ONE_SHEET = 8
"""Methods; of more, each has its own sheet."""


@dataclass(frozen=True, slots=True)
class Method:
    """A run folder or a baseline, on its encoder."""

    source: str
    labeller: TokenLabeller

    @property
    def name(self) -> str:
        encoder = self.labeller.encoder.description
        block = "" if self.source in NAMES and self.source not in READ_BLOCK else f" block {encoder['block']}"
        return f"{self.source} on {encoder['source']}{block} parts {parts_of(self.labeller)}"

    @property
    def config(self) -> dict[str, Any]:
        """What a learner was trained with; nothing of a baseline."""
        file = Path(self.source) / "config.json"
        return read_json(file) if self.source not in NAMES and file.is_file() else {}


def score_parts(config: ScorePartsConfig) -> list[dict[str, Any]]:
    """Score every labeller on every folder, print the table, and return its rows. A foreground below the centre prior
    gets a line on stderr.

    Raises:
        FileNotFoundError: A folder, a truth, a run or an encoder is missing.
        ValueError: A learner on another grid than the table's; a truth of another size
            than its image; shuffled labels of a folder with one image.
    """
    for flag, file in (("--json", config.json), ("--sheet", config.sheet)):
        if file:
            refuse_unwritable(file, flag=flag, folder=False)
    sets = {name: TruthSet(Path(name)) for name in config.images}
    images = sum(len(one.images) for one in sets.values())
    learners = list(_learners(config))
    read = (
        learners[0].labeller.encoder.description
        if learners
        else {"source": "builtin", "block": BUILTIN_READS["encoder_block"]}
    )
    methods = [*learners, *_baselines(config, read)]
    together = _on_one_encoder(methods)
    progress = Progress(LABELLINGS * images * len(together), "score-parts", "views")
    rows: list[dict[str, Any]] = []
    seen: dict[str, dict[str, np.ndarray]] = {name: {} for name in sets}
    for group in together:
        for name, truths in sets.items():
            labellers = [method.labeller for method in group]
            told = score_labellers(labellers, truths, size=config.size, advance=progress.advance)
            for method, (columns, labels) in zip(group, told, strict=True):
                parts, seed = parts_of(method.labeller), method.config.get("seed")
                rows += [_row(name, method.name, parts, seed, one) for one in columns]
                seen[name][method.name] = labels.astype(np.uint8)
    progress.close()
    for name, labels in seen.items():
        for names in _same_but_for_seed(methods):
            agreement = stability([labels[method] for method in names])
            for row in rows:
                if row["set"] == name and row["method"] in names:
                    row["stability"] = agreement
    controls = [
        _row(name, one["method"], one["parts"], None, one)
        for name, truths in sets.items()
        for one in control_rows(truths, size=config.size, grid=config.grid, counts=config.num_parts)
    ]
    below = below_centre(rows, controls)
    rows += controls
    _print(rows)
    for row, prior in below:
        print(
            f"warning: {row['method']} ranks the foreground of {row['set']} ({row['view']}) worse than closeness to "
            f"the centre does: AP {row['foreground_ap']:.3f}, centre {prior:.3f}",
            file=sys.stderr,
        )
    if config.json:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.json, rows)
    if config.sheet:
        _draw(config.sheet, config, sets[config.images[0]], seen[config.images[0]])
    return rows


def _learners(config: ScorePartsConfig) -> Iterator[Method]:
    options: dict[str, Any] = {"device": pick_device(config.device), "precision": config.precision}
    for source in dict.fromkeys(config.parts):
        if source in NAMES:
            continue
        labeller = open_token_labeller(source, **options)
        if labeller.grid != config.grid:
            raise ValueError(
                f"{source} labels {labeller.grid} cells a side, but the controls and baselines of this table "
                f"{config.grid}, and their figures would not compare; pass --grid {labeller.grid}, and score learners "
                "of other grids in tables of their own"
            )
        yield Method(source, labeller)


def _baselines(config: ScorePartsConfig, read: dict[str, Any]) -> Iterator[Method]:
    """Each on every encoder and, where they matter to it, block and count. Default: the source and block that are
    `read`. All on one block share the encoder."""
    names = [source for source in dict.fromkeys(config.parts) if source in NAMES]
    options: dict[str, Any] = {"device": pick_device(config.device), "precision": config.precision}
    asked = {"mean": config.encoder_mean, "std": config.encoder_std}
    options |= asked if config.encoder else {name: read.get(name) for name in asked}
    blocks = config.encoder_block or ((None,) if config.encoder else (read["block"],))
    for encoder, block in product(config.encoder or (read["source"],), blocks):
        here = [name for name in names if name in READ_BLOCK or block == blocks[0]]
        if not here:
            continue
        first = open_token_labeller(here[0], encoder=encoder, grid=config.grid, block=block, **options)
        for name in here:
            for count in config.num_parts[:1] if name in OF_HEADS else config.num_parts:
                yield Method(name, _also(first, name, count))


def _also(labeller: TokenLabeller, name: Any, count: int) -> TokenLabeller:
    """Another baseline on the encoder that a labeller has loaded, which takes seconds."""
    other = copy.copy(labeller)
    other.learner = Baseline(name, labeller.encoder, parts=count)
    other.groups, other.sha256 = other.learner.shape.groups, other.learner.sha256
    return other


def _on_one_encoder(methods: Sequence[Method]) -> list[list[Method]]:
    """Methods that read the same block of the same encoder, which then has to look only once."""
    groups: dict[str, list[Method]] = {}
    for method in methods:
        groups.setdefault(sha256_json(method.labeller.encoder.description), []).append(method)
    return list(groups.values())


def _same_but_for_seed(methods: Sequence[Method]) -> list[list[str]]:
    """Names of runs that differ in their seed alone, and in where and how fast they were computed (`run`)."""
    alike: dict[str, list[str]] = {}
    for method in methods:
        settings = {name: value for name, value in method.config.items() if name not in ("seed", "run")}
        if settings:
            alike.setdefault(sha256_json(settings), []).append(method.name)
    return [names for names in alike.values() if len(names) > 1]


def _row(set_: str, method: str, parts: int, seed: int | None, columns: dict[str, Any]) -> dict[str, Any]:
    row = {"set": set_, "method": method, "parts": parts, "seed": seed}
    row |= {"view": columns["view"], "images": columns["images"]}
    return row | {name: columns[name] for name in COLUMNS} | {"stability": None, "areas": columns["areas"]}


def _print(rows: list[dict[str, Any]]) -> None:
    """A table of SHOWN for each set and view: 80 columns hold it, and names of methods wrap. Titles say how many
    images a view has: square ones have no other than the centre."""
    shown = {column: name for column, name in SHOWN.items() if any(row[column] is not None for row in rows)}
    methods = short_names([row["method"] for row in rows])
    console = Console(width=None if Console().is_terminal else 160)
    images = {(row["set"], row["view"]): row["images"] for row in rows}
    for (name, view), count in images.items():
        title = f"{name}, {view}, {count} images"
        if square := images[name, "centre"] - images.get((name, "off centre"), 0):
            title += f" ({square} of them square)" if view == "centre" else f" ({square} square ones have no such view)"
        table = Table(box=box.SIMPLE_HEAD, title=title, padding=(0, 1, 0, 0), title_justify="left")
        table.add_column("labels", overflow="fold")
        for title in shown.values():
            table.add_column(title, no_wrap=True, min_width=max(4, len(title)), justify="right")
        for row in (row for row in rows if (row["set"], row["view"]) == (name, view)):
            table.add_row(methods[row["method"]], *(_figure(row[column]) for column in shown))
        console.print(table)
    console.print(LEGEND, highlight=False)


def _figure(value: float | None) -> str:
    """Three digits without a leading zero, or one after a whole number: .987, -.012, 5.1."""
    if value is None:
        return ""
    return f"{value:.1f}" if value >= 1 else re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """`heads on vit_small_patch14_dinov2 block 9 parts 6`: no folders and files of weights where two stay apart."""
    names = {}
    for method in dict.fromkeys(methods):
        source, on, encoder = method.partition(" on ")
        name, end = re.split(r"((?: block \d+)? parts \d+$|$)", encoder, maxsplit=1)[:2]
        kind, _, rest = name.partition(":")
        plain = name if kind in ("random", "builtin") else rest.partition("=")[0].rpartition("/")[2]
        names[method] = f"{source.rpartition('/')[2]}{on}{plain}{end}"
    short = list(names.values())
    return {method: name if short.count(name) == 1 else method for method, name in names.items()}


def _draw(sheet: Path, config: ScorePartsConfig, truths: TruthSet, seen: dict[str, np.ndarray]) -> None:
    """Images, truth, and the labels of each method, in one PNG, or in one a method where they are many."""
    view = truths.first(ROWS, size=config.size, grid=config.grid)
    images, true = view.images.astype(np.float32), view.truth
    both = [images, _tinted(images, np.where(true == 255, 0, true))]
    sheets = {sheet: list(seen)}
    if len(seen) > ON_ONE_SHEET:
        sheets = {
            sheet.with_stem(f"{sheet.stem}-{re.sub(r'[^a-zA-Z0-9_.]+', '-', name)}"): [method]
            for method, name in short_names(list(seen)).items()
        }
    sheet.parent.mkdir(parents=True, exist_ok=True)
    for path, methods in sheets.items():
        names = ["image", "truth", *_headings(methods)]
        columns = [*both, *(_tinted(images, seen[method][:ROWS]) for method in methods)]
        write_whole(path, png_of(names, columns))


def _headings(methods: Sequence[str]) -> list[str]:
    """Names of methods without their encoders, block and count, where those are the same of all of one name."""
    short = list(short_names(methods).values())
    first = [name.partition(" on ")[0] for name in short]
    return [name.replace(" on ", " ") if first.count(one) > 1 else one for name, one in zip(short, first, strict=True)]


def _tinted(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels over the image; 0 is the background."""
    groups = int(labels.max()) + 1
    return tinted(images, (labels.astype(np.int64) - 1) % groups, groups)
