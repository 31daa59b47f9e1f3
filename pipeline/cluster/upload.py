"""What an upload to a Ray cluster would hold, and whether Ray would take it."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

LIMIT_MIB = 100
MIB = 2**20
RAY_LEAVES_OUT = (".git", ".venv", "venv", "__pycache__")


def packed(folder: Path, excludes: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Every file that Ray would pack, relative to `folder`, with its size.

    Ray's own rules: `excludes`, and the .gitignore and .rayignore of every folder on the way; links are followed.
    """
    names = (
        [".rayignore"] if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") == "1" else [".gitignore", ".rayignore"]
    )

    def visit(path: Path, rules: list[tuple[Path, GitIgnoreSpec]]) -> Iterator[tuple[str, int]]:
        ignores = [path / name for name in names if (path / name).is_file()]
        rules = rules + [(path, GitIgnoreSpec.from_lines(file.read_text().splitlines())) for file in ignores]
        if any(spec.match_file(path.relative_to(base).as_posix()) for base, spec in rules):
            return
        if path.is_dir():
            for child in sorted(path.iterdir()):
                yield from visit(child, rules)
        elif path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size

    yield from visit(folder, [(folder, GitIgnoreSpec.from_lines(excludes))])


def check_size(folder: Path, files: dict[str, int], *, limit_mib: float = LIMIT_MIB) -> None:
    """Refuse what Ray's Jobs API would answer with HTTP 413; it zips without compressing, so sizes simply add up.

    Raises:
        ValueError: The files, with the zip's headers, reach `limit_mib`; the largest are named.
    """
    total = sum(size + 2 * len(name.encode()) + 100 for name, size in files.items())
    if total < limit_mib * MIB:
        return
    named = ", ".join(f"{name} ({size / MIB:.0f} MiB)" for name, size in largest(files))
    raise ValueError(
        f"{folder} would send {total / MIB:.0f} MiB in {len(files)} files, and Ray takes less than {limit_mib:g} MiB; "
        f"the largest are {named}: name them in .rayignore, or move them out of the folder"
    )


def largest(files: dict[str, int], count: int = 3) -> list[tuple[str, int]]:
    """The heaviest folders (with a slash) and files; of a folder that is nearly all one thing, that thing."""
    weights: Counter[str] = Counter()
    for name, size in files.items():
        weights[name] += size
        for end, letter in enumerate(name):
            if letter == "/":
                weights[name[: end + 1]] += size
    children: dict[str, list[str]] = {}
    for entry in weights:
        children.setdefault(entry.rstrip("/").rpartition("/")[0], []).append(entry)

    def inmost(entry: str) -> str:
        heaviest = max(children.get(entry.rstrip("/"), [entry]), key=weights.__getitem__)
        return entry if heaviest == entry or weights[heaviest] < 0.9 * weights[entry] else inmost(heaviest)

    top = sorted(children.get("", []), key=weights.__getitem__, reverse=True)[:count]
    return [(name, weights[name]) for name in map(inmost, top)]
