"""Uses the minutes that a GPU is at hand: one command, sections bounded in time, one table; see benchmarks/README.md.

python benchmarks/gpu.py --out runs/gpu --photographs people/val cars/val
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MINUTES = 8.8
PREPARING_S = 60.0
"""Most that looking at the card and drawing the images may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuConfig:
    """What is measured, and for how long."""

    out: Path = Path("runs/gpu")
    """Where figures go as they come, and gpu.json and gpu.md; a second call goes on with what is missing."""
    photographs: tuple[Path, ...] = ()
    """Folders with truth (images/ beside labels/ or masks/): parts are learned and scored there. Default: drawings."""
    encoder: str | None = None
    """Frozen encoder of those parts. Default: the one that comes with the project."""
    data: str | None = None
    """Shard set with classes for the masking study. Default: drawings."""
    minutes: float = MINUTES
    """Time for everything; a section has its share of it, the study what is left."""
    rehearse: bool = False
    """Run everything at toy size, on a CPU."""
    commit: str | None = None
    """Commit to name where the checkout has no git."""

    def __post_init__(self):
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be above 0, got {self.minutes}")
        for folder in (*self.photographs, *([Path(self.data)] if self.data else ())):
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder at {folder}, which --photographs or --data names")


def bench_gpu(config: GpuConfig) -> dict[str, Any]:
    """Measure what `config.out` does not hold yet, print the table, and return what gpu.json holds: `machine`, `rows`
    and `cases`.

    Raises:
        ValueError: There is no GPU, or the figures in the folder are of another machine or of other settings.
        RuntimeError: The drawings cannot be made: the disk is full, say.
    """
    ends = time.monotonic() + 60 * config.minutes
    from benchmarks.on_gpu.case import Bench
    from benchmarks.on_gpu.ledger import Ledger
    from benchmarks.on_gpu.report import as_json, as_markdown, as_text, reported
    from benchmarks.on_gpu.run import run_section
    from benchmarks.on_gpu.sections import SECTIONS
    from benchmarks.quiet import cores_here
    from shards.atomic import write_json, write_whole

    config.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((config.out / "inductor").absolute()))
    bench = Bench(
        out=config.out,
        device="cpu" if config.rehearse else "cuda",
        rehearse=config.rehearse,
        photographs=config.photographs,
        encoder=config.encoder or ("random:vit_tiny_patch16_224" if config.rehearse else "small"),
        data=config.data,
        cores=cores_here(),
        ends=ends,
    )
    machine = _prepared(config, bench)
    heading = _heading(config, machine)
    ledger = Ledger(config.out / "ledger.jsonl", str(machine["commit"]))

    def report() -> list:
        told = [reported(one, one.cases(bench), ledger, held=not config.rehearse) for one in SECTIONS]
        write_json(config.out / "gpu.json", as_json(machine, told))
        write_whole(config.out / "gpu.md", as_markdown(f"## {heading}", told).encode())
        return told

    try:
        for section in SECTIONS:
            seconds = section.seconds * config.minutes / MINUTES
            run_section(section, replace(bench, ends=min(ends, time.monotonic() + seconds)), ledger)
            report()
    finally:
        told = report()
        print(as_text(heading, told), flush=True)
    return as_json(machine, told)


def _prepared(config: GpuConfig, bench: Any) -> dict[str, Any]:
    """The machine, told by a process of its own, because no other may touch the GPU before it is forked; the drawings
    are made there too."""
    from benchmarks.on_gpu.against_cpu import drawings
    from benchmarks.on_gpu.machine import describe
    from benchmarks.on_gpu.run import in_a_process
    from shards.atomic import read_json, write_json
    from training.run import git_state

    def prepare() -> None:
        machine = describe(bench.device)
        write_json(config.out / "machine.json", machine)
        if machine["card"] or config.rehearse:
            drawings(bench)

    status = in_a_process(prepare, seconds=PREPARING_S)
    if status != 0:
        raise RuntimeError(f"no drawings could be made in {config.out} (status {status}); the lines above say why")
    machine = read_json(config.out / "machine.json")
    if machine["card"] is None and not config.rehearse:
        raise ValueError("torch finds no CUDA device here; --rehearse runs everything at toy size on a CPU")
    git = git_state()
    machine |= {"commit": config.commit or git["commit"], "dirty": git["dirty"], "time": _now(), "command": sys.argv}
    settings = {
        "card": machine["card"],
        "rehearse": config.rehearse,
        "photographs": [str(folder.absolute()) for folder in config.photographs],
        "encoder": bench.encoder,
        "data": config.data,
    }
    _claim(config.out / "settings.json", settings)
    write_json(config.out / "machine.json", machine)
    return machine


def _claim(path: Path, ours: dict[str, Any]) -> None:
    """A folder's figures are of one machine and of one choice of what is measured."""
    from shards.atomic import read_json, write_json

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
    commit = f"{machine['commit']}{' with changes' if machine['dirty'] else ''}"
    return (
        f"{machine['time'][:10]}: {'rehearsal on a ' if config.rehearse else ''}{card}, {machine['cores']} cores, "
        f"Python {versions['python']}, torch {versions['torch']} (CUDA {versions['cuda']}), timm {versions['timm']}, "
        f"simplejpeg {versions['simplejpeg']}, commit {commit}"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _parsed(arguments: list[str] | None) -> GpuConfig:
    parser = argparse.ArgumentParser(
        description="This project on a GPU: does everything run, how fast, and do parts get better by training?",
        epilog="Example: python benchmarks/gpu.py --out runs/gpu --photographs people/val cars/val",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="figures, gpu.json, gpu.md (%(default)s)")
    parser.add_argument("--photographs", type=Path, nargs="+", default=(), metavar="DIR", help="folders with truth")
    parser.add_argument("--encoder", help="frozen encoder of the parts (the one that comes with the project)")
    parser.add_argument("--data", help="shard set with classes, for the masking study (drawings)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="everything at toy size, on a CPU")
    parser.add_argument("--commit", help="commit to name where the checkout has no git")
    given = vars(parser.parse_args(arguments))
    return GpuConfig(**given | {"photographs": tuple(given["photographs"])})


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, or as far as the time allowed; 1 a case failed; 2 the call was wrong; 130 interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        told = bench_gpu(_parsed(arguments))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    return int(any(case["state"] == "failed" for case in told["cases"]))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose files are no modules by themselves
    sys.exit(main())
