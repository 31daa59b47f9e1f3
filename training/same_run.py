"""Whether what a run folder's config.json says and a config are the same run."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def as_json(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values (paths as text, tuples as lists)."""
    return _plain(dataclasses.asdict(config))


def told(config: Any) -> dict[str, Any]:
    """What config.json says of a run."""
    return as_json(config) | {"verb": type(config).__name__}


def refuse_another(path: Path, theirs: dict[str, Any], config: Any, *, raisable: Collection[str] = ()) -> None:
    """Check that config.json in `path`, which says `theirs`, is of the same run as `config`.

    `run` is left out of the comparison: it says where and how fast, never what. A field that is younger than the run
    counts as its default there.

    Raises:
        ValueError: It is not; the fields that differ are named.
    """
    ours, theirs = told(config), _defaults(config) | theirs
    differing = [
        name for name in sorted((set(ours) | set(theirs)) - {"run"}) if _bare(theirs.get(name)) != _bare(ours.get(name))
    ]
    if differing:
        values = "; ".join(f"{name} was {theirs.get(name)!r}, now {ours.get(name)!r}" for name in differing)
        rule = "may only be raised, and only in a finished run that has a checkpoint"
        rules = (f"{name} {rule}; " for name in differing if name in raisable)
        raise ValueError(
            f"{path} belongs to another run ({values}); {''.join(rules)}choose another --out or the old settings"
        )


def raised(theirs: dict[str, Any], ours: dict[str, Any], raisable: Collection[str]) -> dict[str, Any]:
    """The fields of `raisable` that are higher in `ours`, as they are there."""
    return {name: ours[name] for name in raisable if name in theirs and ours[name] > theirs[name]}


def _defaults(config: Any) -> dict[str, Any]:
    fields = dataclasses.fields(config)
    return _plain({one.name: one.default for one in fields if one.default is not dataclasses.MISSING})


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _bare(value: Any) -> Any:
    """A folder is the same one with a slash at its end."""
    return value.rstrip("/") if isinstance(value, str) else value
