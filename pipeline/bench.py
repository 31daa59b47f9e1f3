"""The verb `bench`: finds or draws the images, runs one benchmark, prints its rows beside their bars."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.extract import bench_extract
from benchmarks.learn import bench_learn
from benchmarks.loader import bench_loader
from benchmarks.masking import bench_masking
from benchmarks.on_gpu.config import MINUTES as GPU_MINUTES
from benchmarks.on_gpu.config import GpuConfig
from benchmarks.on_gpu.measure import bench_gpu
from benchmarks.rounds import Report, verdict
from benchmarks.step import bench_step
from pipeline.config import BenchConfig
from pipeline.creatures import write_creatures
from shards.atomic import write_json
from shards.places import refuse_unwritable
from training.config import RunConfig
from training.progress import Progress
from training.run_folder import git_state, package_versions

DRAWN, DRAWN_SIDE = 256, 256
MINUTES = 4.0


def bench(config: BenchConfig) -> None:
    """Run the benchmark `config.name`; a bar that does not hold is said in the table and is no error.

    `environment.json` in the folder says which machine, versions and commit the figures are of.

    Raises:
        FileNotFoundError: There are no such images, or no such part learner.
        BenchError: Of gpu: something could not be measured.
    """
    out = config.out or Path("runs/gpu" if config.name == "gpu" else "runs/bench")
    refuse_unwritable(out)
    if config.json:
        refuse_unwritable(config.json, flag="--json", folder=False)
    if config.name == "gpu":
        _gpu(config, out)
        return
    minutes = config.minutes or MINUTES
    out.mkdir(parents=True, exist_ok=True)
    if config.name == "masking":
        _told(config, out, bench_masking(minutes=minutes))
        return
    run = RunConfig(out=out, device=config.device, threads=config.threads)
    if config.name == "step":
        _told(config, out, bench_step(minutes=minutes, run=run, rehearse=config.rehearse))
        return
    images = config.images or _creatures(out / "creatures")
    if config.name == "loader":
        report = bench_loader(images, out=out, minutes=minutes, most=config.max_images)
    elif config.name == "learn":
        report = bench_learn(images, minutes=minutes, run=run)
    else:
        report = bench_extract(
            images,
            parts=config.parts,
            out=out,
            minutes=minutes,
            most=config.max_images,
            build=config.build,
            run=run,
        )
    _told(config, out, report)


def _told(config: BenchConfig, out: Path, report: Report) -> None:
    """Printed, and written where that was asked for."""
    _print(config.name, report)
    if config.json:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.json, [row.as_json() for row in report.rows])
    write_json(out / "environment.json", _environment())


def _gpu(config: BenchConfig, out: Path) -> None:
    """What `python benchmarks/gpu.py` does, which needs none of this file's packages and prints its own table."""
    bench_gpu(
        GpuConfig(
            out=out,
            photographs=config.photographs,
            encoder=config.encoder,
            data=config.data,
            minutes=config.minutes or GPU_MINUTES,
            json=config.json,
            rehearse=config.rehearse,
        )
    )


def _creatures(folder: Path) -> str:
    progress = Progress(DRAWN, "drawing creatures", "images")
    write_creatures(folder, count=DRAWN, seed=0, size=DRAWN_SIDE, progress=progress.advance)
    progress.close()
    return str(folder)


def _environment() -> dict[str, object]:
    return {
        "command": sys.argv,
        "git": git_state(),
        "versions": package_versions() | {"webdataset": version("webdataset")},
        "machine": platform.platform(),
        "cores": os.cpu_count(),
    }


def _print(name: str, report: Report) -> None:
    numbers = ("median", "quartiles", "n")
    table = Table(
        title=f"bench {name}",
        caption=report.caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("name", "unit", *numbers, "bar", "verdict"):
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    for row in report.rows:
        bar = " ".join(map(str, report.bars.get(row.name, ()))).replace(">=", "≥").replace("<=", "≤")
        quartiles = f"{row.low:,.4g}–{row.high:,.4g}" if row.low < row.high else ""
        shown = (f"{row.value:,.4g}", quartiles, str(row.n), bar, verdict(row, report.bars))
        table.add_row(row.name, row.unit, *shown)
    Console().print(table)
