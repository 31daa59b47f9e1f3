"""`make faults`: plants each fault of faults.toml, alone, in a copy of this checkout, and sees whether its tests fail.

python tests/faults.py [--jobs N] [WORD ...]     only faults whose name or file holds one of the words
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

HERE = Path(__file__).parents[1]
LIST = Path(__file__).with_name("faults.toml")
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch.utils.tensorboard", "torch._dynamo", "torchvision", "timm.optim", "hypothesis", "scipy.optimize"]
)
"""Slow to load, and not ours."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of one file, as it is and broken, and the tests of which one must fail."""

    name: str
    file: str
    line: str
    broken: str
    tests: tuple[str, ...]

    def planted(self, root: Path) -> str:
        """The whole file with this fault in it.

        Raises:
            ValueError: The line is not there exactly once.
        """
        text = (root / self.file).read_text()
        if (found := text.count(self.line)) != 1:
            raise ValueError(f"{self.name}: expected once in {self.file}, found {found} times: {self.line}")
        return text.replace(self.line, self.broken)


def listed() -> list[Fault]:
    """The faults of faults.toml."""
    entries = tomllib.loads(LIST.read_text())["fault"]
    return [Fault(**one | {"tests": tuple(one["tests"])}) for one in entries]


def copied(root: Path) -> Path:
    """The files git knows of, as they lie here, below `root`."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=HERE,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in names.split("\0"):
        if (HERE / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / name, root / name)
    return root


def outcome(root: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit status and the first test that failed, or its last words."""
    process = SERVER.Process(target=_pytest, args=(root, tests))
    process.start()
    process.join()
    lines = (root / "said").read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return process.exitcode or 0, (failed or lines[-1:] or [""])[0]


def _pytest(root: Path, tests: tuple[str, ...]) -> None:
    """In a process of its own, which other people's packages are loaded in already."""
    sys.dont_write_bytecode = False
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    with open("said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    import pytest

    sys.exit(pytest.main([*OPTIONS, *tests]))


def tried(fault: Fault, roots: "Queue[Path]") -> bool:
    """Whether the fault is caught, said on a line."""
    root, began = roots.get(), time.monotonic()
    whole = (root / fault.file).read_text()
    try:
        (root / fault.file).write_text(fault.planted(root))
        status, said = outcome(root, fault.tests)
    finally:
        (root / fault.file).write_text(whole)
        roots.put(root)
    caught = status == 1 and said.startswith(("FAILED tests/", "ERROR tests/"))
    verdict = "caught" if caught else "SURVIVED" if status == 0 else f"NO VERDICT ({status})"
    print(f"{verdict:9} {time.monotonic() - began:4.0f} s  {fault.name}  [{said[:120]}]", flush=True)
    return caught


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at a time, each in a copy of its own")
    parser.add_argument("--unbroken", action="store_true", help="first see that the tests pass without any fault")
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args()
    faults = [one for one in listed() if not asked.words or any(w in one.name + one.file for w in asked.words)]
    for fault in faults:
        fault.planted(HERE)  # a stale entry is an error before anything runs
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        roots: Queue[Path] = Queue()
        for number in range(asked.jobs):
            roots.put(copied(Path(folder) / str(number)))
        if asked.unbroken:
            status, said = outcome(Path(folder) / "0", tuple(sorted({test for one in faults for test in one.tests})))
            if status:
                print(f"tests fail without any fault: {said}", file=sys.stderr)
                return 2
        with ThreadPoolExecutor(asked.jobs) as pool:
            caught = list(pool.map(lambda fault: tried(fault, roots), faults))
    print(f"{sum(caught)} of {len(caught)} faults caught in {time.monotonic() - began:.0f} s")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main())
