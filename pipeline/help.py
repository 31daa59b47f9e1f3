"""Configs as the command line shows them: each option's help on one line, and some fields hidden or left open."""

import dataclasses
import typing
from collections.abc import Collection
from typing import Annotated, Any

import docstring_parser
import tyro

from shards.places import at_home

OPEN = "(default: the preset's, or what fits)"


def shown(
    config: type, *, hidden: Collection[str] = (), open_: Collection[str] = (), usual: Collection[str] = ()
) -> Any:
    """A dataclass with the fields of `config`, for tyro alone; `made` turns one into the config.

    tyro breaks a help text wherever its docstring does, in the middle of a sentence.

    Args:
        hidden: Fields that only Python sets; they have no option.
        open_: Fields that something else decides where the command line does not: None is their default.
        usual: Those of them for which that is always the config's own default.
    """
    docs = {
        one.arg_name: " ".join((one.description or "").split())
        for base in reversed(config.__mro__[:-1])
        for one in docstring_parser.parse_from_object(base).params
    }
    hints = typing.get_type_hints(config, include_extras=True)
    made_of: list[Any] = []
    for field in dataclasses.fields(config):
        if field.name in hidden:
            continue
        kind, default = hints[field.name], field.default
        if dataclasses.is_dataclass(kind):
            made_of.append((field.name, shown(typing.cast(type, kind), hidden=hidden)))
            continue
        text = docs[field.name]
        hint = None if default is not None else "" if "Default:" in text else "(optional)"
        if field.name in open_:
            hint = OPEN if field.name not in usual else hint if default is None else f"(default: {default})"
            kind, default = kind | None, None
        argument = tyro.conf.arg(help=text, help_behavior_hint=hint)
        spec = dataclasses.field() if default is dataclasses.MISSING else dataclasses.field(default=default)
        made_of.append((field.name, Annotated[kind, argument], spec))
    like = dataclasses.make_dataclass(config.__name__, made_of, kw_only=True, frozen=True)
    like.__doc__ = config.__doc__
    like.config = config  # type: ignore[attr-defined]
    return like


def options(
    config: type, *, hidden: Collection[str] = (), open_: Collection[str] = (), usual: Collection[str] = ()
) -> Any:
    """What tyro reads the options of a config from; the verb is then given a look-alike, for `made`."""
    return tyro.conf.arg(name="", constructor=shown(config, hidden=hidden, open_=open_, usual=usual))


def fields_of(given: Any) -> dict[str, Any]:
    """What the command line gave, by field; a nested one as its config, and `~` as the home folder that it means.

    The words of a job are the command line's of another machine, which knows its own homes.
    """
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    return {
        name: made(one) if dataclasses.is_dataclass(one) else one if name == "job" else at_home(one)
        for name, one in values.items()
    }


def made(given: Any) -> Any:
    """The config that the command line gave."""
    return type(given).config(**fields_of(given))


def overview(verbs: dict[str, Any]) -> str:
    """A line a verb."""
    lines = [f"  {name:12} {(verb.__doc__ or '').strip().splitlines()[0]}" for name, verb in verbs.items()]
    return "\n".join(
        [
            "usage: semmae VERB [OPTIONS]",
            "",
            "Semantic-guided masking for masked autoencoders, from images to numbers.",
            "",
            *lines,
            "",
            "semmae VERB --help shows the options of a verb, with an example; semmae --version, the version.",
        ]
    )
