"""The verb `score-parts`: a table of labellers against the truth, with shortcuts in the same table, and a sheet."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from evaluate.part_quality import PART_COLUMNS
from evaluate.part_scores import LABELLINGS, control_rows, score_labellers
from evaluate.truth import TruthSet
from partlearn.label import Labeller
from pipeline.config import ScorePartsConfig
from pipeline.sheet import ROWS, assemble, coloured, enlarged
from shards.atomic import read_json, sha256_json, write_json, write_whole
from training.device import pick_device
from training.progress import Progress

COLUMNS = ("foreground_ap", "foreground_recall_quarter", *PART_COLUMNS, "shift_ari", "flip_agreement")


def score_parts(config: ScorePartsConfig) -> list[dict[str, Any]]:
    """Score every labeller on every folder, print the table, and return its rows.

    Raises:
        FileNotFoundError: A folder, a truth, a run or an encoder is missing.
        ValueError: A baseline without an encoder.
    """
    sets = {name: TruthSet(Path(name)) for name in config.images}
    pictures = sum(len(one.pictures) for one in sets.values())
    labellers = {source: _labeller(config, source) for source in config.parts}
    together = _on_one_encoder(labellers)
    progress = Progress(LABELLINGS * pictures * len(together), "score-parts", "pictures")
    rows: list[dict[str, Any]] = []
    seen: dict[str, np.ndarray] = {}
    groups = config.count + 1
    for sources in together:
        for name, truths in sets.items():
            group = [labellers[source] for source in sources]
            told = score_labellers(group, truths, size=config.size, advance=progress.advance)
            for source, labeller, (columns, labels) in zip(sources, group, told, strict=True):
                method = _method(source, labeller)
                rows += [_row(name, method, labeller.groups - 1, _seed(source), one) for one in columns]
                if name == config.images[0]:
                    seen[method] = labels[:ROWS]
    progress.close()
    for name, truths in sets.items():
        controls = control_rows(truths, size=config.size, grid=config.grid, groups=groups)
        rows += [_row(name, one["method"], config.count, None, one) for one in controls]
    if config.json:
        write_json(config.json, rows)
    if config.sheet:
        _draw(config, sets[config.images[0]], seen)
    _print(rows)
    return rows


def _on_one_encoder(labellers: dict[str, Labeller]) -> list[list[str]]:
    """Sources whose labellers read the same block of the same encoder, which then has to look only once."""
    groups: dict[str, list[str]] = {}
    for source, labeller in labellers.items():
        groups.setdefault(sha256_json(labeller.encoder.description), []).append(source)
    return list(groups.values())


def _labeller(config: ScorePartsConfig, source: str) -> Labeller:
    baseline = not Path(source).exists()
    return Labeller(
        source,
        encoder=config.encoder if baseline else None,
        grid=config.grid if baseline else None,
        block=config.encoder_block if baseline else None,
        count=config.count,
        device=pick_device(config.device),
        precision=config.precision,
    )


def _method(source: str, labeller: Labeller) -> str:
    encoder = labeller.encoder.description
    return f"{source} on {encoder['source']} block {encoder['block']}"


def _seed(source: str) -> int | None:
    """The seed a learner was trained with; baselines have none."""
    config = Path(source) / "config.json"
    return read_json(config)["seed"] if config.is_file() else None


def _row(set_: str, method: str, parts: int, seed: int | None, columns: dict[str, Any]) -> dict[str, Any]:
    row = {"set": set_, "method": method, "parts": parts, "seed": seed, "view": columns["view"]}
    return row | {name: columns[name] for name in COLUMNS}


def _print(rows: list[dict[str, Any]]) -> None:
    short = {"foreground_ap": "AP", "foreground_recall_quarter": "recall", "beyond_shortcut": "beyond"}
    short |= {"beyond_other": "beyond 2", "nmi_image": "nmi img", "ari_image": "ari img", "colour_nmi": "colour"}
    short |= {"bands_nmi": "bands", "parts_used": "used", "largest_share": "largest", "shift_ari": "shift"}
    short |= {"flip_agreement": "flip"}
    for name in dict.fromkeys(row["set"] for row in rows):
        table = Table("method", "view", *(short.get(column, column) for column in COLUMNS), box=box.SIMPLE_HEAD)
        for row in (row for row in rows if row["set"] == name):
            figures = ("" if row[column] is None else f"{row[column]:.3f}".replace("0.", ".", 1) for column in COLUMNS)
            table.add_row(_short(row["method"]), row["view"], *figures)
        Console(width=None if Console().is_terminal else 220).print(name, table)


def _short(method: str) -> str:
    """`heads on vit_small_patch14_dinov2 block 9`: no folders, no files of weights."""
    source, on, encoder = method.partition(" on ")
    name, block, number = encoder.partition(" block ")
    plain = name.partition(":")[2].partition("=")[0].rpartition("/")[2]
    return f"{source.rpartition('/')[2]}{on}{plain}{block}{number}"


def _draw(config: ScorePartsConfig, truths: TruthSet, seen: dict[str, np.ndarray]) -> None:
    """Pictures, truth, and the labels of each method, in one PNG."""
    assert config.sheet
    view = truths.centre(size=config.size, grid=config.grid)
    images, true = view.images[:ROWS].astype(np.float32), view.truth[:ROWS]
    columns = [images, _tinted(images, np.where(true == 255, 0, true))]
    columns += [_tinted(images, labels) for labels in seen.values()]
    names = ["picture", "truth", *(method.partition(" on ")[0].rpartition("/")[2] for method in seen)]
    buffer = io.BytesIO()
    assemble(names, columns).save(buffer, "PNG")
    config.sheet.parent.mkdir(parents=True, exist_ok=True)
    write_whole(config.sheet, buffer.getvalue())


def _tinted(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels as colours over the picture; 0, the background, dark."""
    groups = int(labels.max()) + 1
    last = (labels.astype(np.int64) - 1) % groups
    return 0.35 * images + 0.65 * enlarged(coloured(last, groups), images.shape[1])
