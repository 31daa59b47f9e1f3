"""Uses the minutes that a GPU is at hand: one command, sections bounded in time, one table; see benchmarks/README.md.

python benchmarks/gpu.py --out runs/gpu --photographs people/val cars/val
"""

import argparse
import signal
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, or as far as the time allowed; 1 a case failed; 2 the call was wrong; 130 interrupted."""
    from benchmarks.on_gpu.config import MINUTES, BenchError, GpuConfig

    given = vars(_parser(MINUTES).parse_args(arguments))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        config = GpuConfig(**given | {"photographs": tuple(given["photographs"])})
        from benchmarks.on_gpu.measure import bench_gpu  # torch and the rest: not for --help

        bench_gpu(config)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError, BenchError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, BenchError) else 2
    return 0


def _parser(minutes: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="This project on a GPU: does everything run, how fast, and do parts get better by training?",
        epilog="Example: python benchmarks/gpu.py --out runs/gpu --photographs people/val cars/val",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="figures, gpu.json, gpu.md (%(default)s)")
    parser.add_argument("--photographs", type=Path, nargs="+", default=(), metavar="DIR", help="folders with truth")
    parser.add_argument("--encoder", help="frozen encoder of the parts (the one that comes with the project)")
    parser.add_argument("--data", help="shard set with classes, for the masking study (drawings)")
    parser.add_argument("--minutes", type=float, default=minutes, help="for everything (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows there too, as a JSON list")
    parser.add_argument("--rehearse", action="store_true", help="everything at toy size, on a CPU")
    parser.add_argument("--commit", help="commit to name where the checkout has no git")
    return parser


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose files are no modules by themselves
    sys.exit(main())
