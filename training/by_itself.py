"""Modules that are run by themselves: python -m MODULE PATH ..."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from shards.errors import ShardError
from training.checkpoint import CheckpointError
from training.sentence import sentence, status


def by_itself(show: Callable[..., None], told: str | None) -> None:
    """Call `show` with the paths on the command line, and end the process with the exit status that a verb has.

    Args:
        told: What is said, with exit status 2, where there are fewer or more paths than `show` takes, or an option.
    """
    arguments = sys.argv[1:]
    try:
        inspect.signature(show).bind(*arguments)
    except TypeError:
        arguments = ["--help"]
    if any(one.startswith("-") for one in arguments):
        print(told, file=sys.stderr)
        sys.exit(2)
    try:
        show(*map(Path, arguments))
    except (OSError, ValueError, CheckpointError, ShardError) as error:
        print(sentence(error), file=sys.stderr)
        sys.exit(status(error))
