"""All sections, one after the other, and the tables of what they found."""

import os
import shutil
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.on_gpu.against_cpu import drawings
from benchmarks.on_gpu.case import Bench
from benchmarks.on_gpu.config import MINUTES, BenchError, GpuConfig
from benchmarks.on_gpu.ledger import Ledger
from benchmarks.on_gpu.machine import NOMINAL, describe
from benchmarks.on_gpu.report import Reported, as_json, as_markdown, as_text, reported
from benchmarks.on_gpu.run import in_a_process, run_section
from benchmarks.on_gpu.sections import SECTIONS
from benchmarks.quiet import cores_here
from shards.atomic import read_json, write_json, write_whole
from training.run_folder import git_state

PREPARING_S = 60.0
"""Most that looking at the card and drawing the images may take."""


def bench_gpu(config: GpuConfig) -> dict[str, Any]:
    """Measure what `config.out` does not hold yet, print the table, and return what gpu.json holds: `machine`, `rows`
    and `cases`.

    Raises:
        ValueError: There is no GPU; or the folder is in use, or its figures are of another machine or other settings.
        BenchError: A case failed, or the drawings cannot be made; what was measured is kept.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(config.out / ".lock").acquire(blocking=False)
    except Timeout:
        raise ValueError(f"{config.out} is in use by another call; wait for it or choose another --out") from None
    with held:
        return _measured(config)


def _measured(config: GpuConfig) -> dict[str, Any]:
    """The same, by the only call in the folder."""
    ends = time.monotonic() + 60 * config.minutes
    shutil.rmtree(config.out / "scratch", ignore_errors=True)
    (config.out / "scratch").mkdir()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((config.out / "inductor").absolute()))
    bench = Bench(
        out=config.out,
        device="cpu" if config.rehearse else "cuda",
        rehearse=config.rehearse,
        photographs=config.photographs,
        encoder=config.encoder or ("random:vit_tiny_patch16_224" if config.rehearse else "builtin"),
        data=config.data,
        cores=cores_here(),
        ends=ends,
    )
    machine = _prepared(config, bench)
    heading = _heading(config, machine)
    ledger = Ledger(config.out / "ledger.jsonl", machine["commit"])

    def report() -> list[Reported]:
        told = [reported(one, one.cases(bench), ledger, held=not config.rehearse) for one in SECTIONS]
        write_json(config.out / "gpu.json", as_json(machine, told))
        write_whole(config.out / "gpu.md", as_markdown(f"## {heading}", told).encode())
        return told

    try:
        for section in SECTIONS:
            share = section.seconds * config.minutes / MINUTES
            seconds = float("inf") if config.rehearse else share  # a slow CPU has time
            run_section(section, replace(bench, ends=min(ends, time.monotonic() + seconds)), ledger)
            report()
    finally:
        told = report()
        print(as_text(heading, told), flush=True)
    found = as_json(machine, told)
    if config.json:
        write_json(config.json, found["rows"])
    failed = [f"{case['section']}/{case['case']}" for case in found["cases"] if case["state"] == "failed"]
    if failed:
        raise BenchError(f"{len(failed)} cases failed, {', '.join(failed)}; the table says why, a second call retries")
    return found


def _prepared(config: GpuConfig, bench: Bench) -> dict[str, Any]:
    """The machine, told by a process of its own, because no other may touch the GPU before it is forked; the drawings
    are made there too."""

    def prepare() -> None:
        machine = describe(bench.device)
        write_json(bench.scratch / "machine.json", machine)
        if machine["card"] or config.rehearse:
            drawings(bench)

    status = in_a_process(prepare, seconds=PREPARING_S)
    if status != 0:
        raise BenchError(f"no drawings could be made in {config.out} (status {status}); the lines above say why")
    machine = read_json(bench.scratch / "machine.json")
    if machine["card"] is None and not config.rehearse:
        raise ValueError("torch finds no CUDA device here; --rehearse runs everything at toy size on a CPU")
    git = git_state()
    machine |= {
        "commit": config.commit or git["commit"] or "unknown",
        "dirty": git["dirty"],
        "time": _now(),
        "command": sys.argv,
    }
    settings = {
        "card": machine["card"],
        "driver": machine.get("driver"),
        "torch": machine["versions"]["torch"],
        "rehearse": config.rehearse,
        "photographs": [str(folder.absolute()) for folder in config.photographs],
        "encoder": bench.encoder,
        "data": config.data,
    }
    _claim(config.out / "settings.json", settings)
    return machine


def _claim(path: Path, ours: dict[str, Any]) -> None:
    """A folder's figures are of one machine and of one choice of what is measured."""
    theirs = read_json(path) if path.is_file() else ours
    differing = [
        f"{name} was {theirs.get(name)!r}, now {ours[name]!r}" for name in ours if theirs.get(name) != ours[name]
    ]
    if differing:
        raise ValueError(f"{path.parent} holds figures of another call ({'; '.join(differing)}); choose another --out")
    write_json(path, ours)


def _heading(config: GpuConfig, machine: dict[str, Any]) -> str:
    """Everything that a table must carry, on one line."""
    versions = machine["versions"]
    card = f"{machine['card']}, {machine['memory_gb']} GB, driver {machine['driver']}" if machine["card"] else "CPU"
    if machine["card"] not in (None, *NOMINAL):
        card += ", nominal rate unknown"
    commit = f"{machine['commit']}{' with changes' if machine['dirty'] else ''}"
    return (
        f"{machine['time'][:10]}: {'rehearsal on a ' if config.rehearse else ''}{card}, {machine['cores']} cores, "
        f"Python {versions['python']}, torch {versions['torch']} (CUDA {versions['cuda']}), timm {versions['timm']}, "
        f"simplejpeg {versions['simplejpeg']}, commit {commit}"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
