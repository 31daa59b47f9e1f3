"""A number with everything it came from, as one line of results.jsonl."""

import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate.config import FeatureConfig
from evaluate.features import TrainAndTest
from shards.atomic import sha256_json, write_json
from shards.places import refuse_unwritable
from training.run_folder import package_versions
from training.same_run import as_json

WHERE = (
    *("checkpoint", "encoder", "encoder_mean", "encoder_std", "data", "images", "val_data", "val_images"),
    *("labels", "val_labels", "json", "out"),
)
HOW_FAST = ("device", "threads", "debug")


class RowsNotKept(Exception):
    """Rows were found and could not be written; they are in `rows`, to be printed all the same."""

    def __init__(self, rows: "Sequence[Result]", reason: str):
        super().__init__(reason)
        self.rows = rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row."""

    protocol: str
    """`knn`, `probe`, ..."""
    metric: str
    """`top1`, `top5`: percent of test images whose class is the best guess, or among the best five."""
    value: float
    checkpoint: str
    """The path or encoder source as the caller named it, and the normalisation, where that was named too."""
    checkpoint_sha256: str
    """Of the checkpoint file; for an encoder source, of its tensors as loaded."""
    config_sha256: str
    """Of the protocol's settings alone, preparation, tokens and pool among them: no paths, no seed. Rows with equal
    hashes may be compared."""
    data_fingerprint: str
    """Of the images that were read; of their labels where these chose the tokens."""
    settings: dict[str, Any]
    """The protocol's settings with `size` and `keep_share` as they were, whoever set them."""
    preparation: str
    """How images became squares: see STORED and CENTRE_CROP in evaluate/data.py."""
    tokens: str
    """`full` or `kept`."""
    pool: str
    seed: int
    epochs: int
    """Epochs the protocol itself trained; 0 for k-NN."""
    versions: dict[str, str]
    time: str
    """When the number was found: ISO 8601, UTC."""


def rows_of(
    config: FeatureConfig,
    found: TrainAndTest,
    values: dict[str, float],
    *,
    protocol: str,
    epochs: int,
    time: str,
) -> list[Result]:
    """One row a metric of `values`."""
    left_out = {*WHERE, *HOW_FAST, "batch_size", "seed"}
    asked = {name: value for name, value in as_json(config).items() if name not in left_out}
    asked |= {"preparation": found.preparation, "keep_share": found.keep_share}
    return [
        Result(
            protocol=protocol,
            metric=metric,
            value=value,
            checkpoint=found.checkpoint,
            checkpoint_sha256=found.checkpoint_sha256,
            config_sha256=sha256_json({"protocol": protocol} | asked),
            data_fingerprint=found.data_fingerprint,
            settings=asked | {"size": found.size},
            preparation=found.preparation,
            tokens=config.tokens,
            pool=config.pool,
            seed=config.seed,
            epochs=epochs,
            versions=package_versions(),
            time=time,
        )
        for metric, value in values.items()
    ]


def expect_results(config: FeatureConfig) -> None:
    """Before the work: that the rows will be kept where they were asked for.

    Where nobody asked for a place, and the default cannot be written (somebody else's run), a line on stderr says so.

    Raises:
        ValueError: `--json` or `--out` cannot be written.
    """
    if config.json is not None:
        refuse_unwritable(config.json, flag="--json", folder=False)
    path = results_path(config.checkpoint, config.out)
    try:
        refuse_unwritable(path.parent)
        if path.exists():
            _refuse_closed(path)
    except ValueError as error:
        if config.out is not None:
            raise
        instead = "" if config.json is not None else "; --out FOLDER keeps them, without it they are printed alone"
        print(f"warning: {path} will not have the rows ({error}){instead}", file=sys.stderr)


def _refuse_closed(path: Path) -> None:
    try:
        open(path, "ab").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another --out") from None


def write_results(config: FeatureConfig, rows: Sequence[Result]) -> None:
    """Add the rows to the results.jsonl they belong to, and write `--json` when asked.

    Raises:
        RowsNotKept: Neither holds them, or not the one that was asked for.
    """
    path, failed = results_path(config.checkpoint, config.out), None
    try:
        append_results(path, rows)
    except OSError as error:
        if config.json is None or config.out is not None:
            failed = RowsNotKept(rows, _not_kept(path, error))
    try:
        if config.json is not None:
            config.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(config.json, [dataclasses.asdict(row) for row in rows])
    except OSError as error:
        failed = RowsNotKept(rows, _not_kept(config.json, error))
    if failed:
        raise failed


def _not_kept(path: Path | None, error: OSError) -> str:
    return f"the rows could not be kept in {path} ({error.strerror}); --out FOLDER or --json FILE keeps them elsewhere"


def results_path(checkpoint: str, out: Path | None) -> Path:
    """results.jsonl in `out`, else in the run folder that `checkpoint` is in, else in ./runs."""
    if out is not None:
        return out / "results.jsonl"
    if not checkpoint:
        return Path("runs") / "results.jsonl"
    path = Path(checkpoint)
    for folder in (path, *path.parents):
        if (folder / "config.json").is_file():
            return folder / "results.jsonl"
    return (path if path.is_dir() else path.parent) / "results.jsonl"


def append_results(path: Path, rows: Sequence[Result]) -> None:
    """Add the rows to `path`, one JSON line each: all of them and on disk, or none.

    Other processes wait meanwhile. Half a line that a crash left at the end is cut off first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(dataclasses.asdict(row), sort_keys=True) + "\n" for row in rows).encode()
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        try:
            written = 0
            while written < len(lines):
                written += file.write(lines[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole)
            raise
