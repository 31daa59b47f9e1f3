"""The ViTs in a checkpoint, wherever and under whatever prefixes they lie, and which of them is meant.

A ViT is where a patch embedding is; all that shares its prefix belongs to it. So DDP's `module.`, torch.compile's
`_orig_mod.`, Lightning's `model.`, DINO's `teacher.backbone.` and any nesting of them need no list of prefixes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DDP, torch.compile, FSDP and activation checkpointing put into names; nothing of ours means anything by them."""
PATCH_EMBEDDINGS = (
    ("patch_embed", "proj", "weight"),  # timm, Meta
    ("patch_embed", "proj", "0", "weight"),  # a stem of convolutions, to be refused by what it is
    ("patch_embed", "projection", "weight"),  # mmpretrain
    ("embeddings", "patch_embeddings", "projection", "weight"),  # Hugging Face
)
EMA, TEACHER, MOMENTUM, PLAIN, LAST = range(5)
MOMENTUM_NAMES, LAST_NAMES = {"encoder_k"}, {"base_encoder", "encoder_q"}


@dataclass(frozen=True, slots=True)
class Branch:
    """One ViT of a checkpoint."""

    place: tuple[str, ...]
    """Keys and prefixes it lies under, outermost first, without WRAPPERS."""
    tensors: dict[str, Tensor]
    """By the names inside."""

    @property
    def name(self) -> str:
        return ".".join(self.place)


def branches(content: Any) -> list[Branch]:
    """Every ViT in `content`, the preferred first: an average (EMA) before a teacher before a momentum encoder, any of
    them before what was trained, and a student last. The innermost name decides, then the next one out."""
    found = [branch for place, tensors in _state_dicts(content, (), set()) for branch in _of_state_dict(place, tensors)]
    return sorted(found, key=preference)


def preference(branch: Branch) -> tuple[int, ...]:
    """Lower is better; equal for two between which nothing decides."""
    ranks = [rank for rank in map(_rank, reversed(branch.place)) if rank != PLAIN]
    return (*ranks, *[PLAIN] * (8 - len(ranks)))


def same(one: Branch, other: Branch) -> bool:
    """Whether two branches hold the same numbers."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(value, other.tensors[name]) for name, value in one.tensors.items()
    )


def tensor_names(content: Any) -> list[str]:
    """Names of all tensors, as a refusal shows them."""
    return [".".join((*place, name)) for place, tensors in _state_dicts(content, (), set()) for name in tensors]


def _state_dicts(
    content: Any, place: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dict that holds tensors, and the keys it lies under."""
    if not isinstance(content, dict) or id(content) in seen:
        return
    seen.add(id(content))
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        yield from _state_dicts(value, (*place, str(key)), seen)


def _of_state_dict(place: tuple[str, ...], tensors: dict[str, Tensor]) -> Iterator[Branch]:
    split = {name: tuple(name.split(".")) for name in tensors}
    roots = {root for root in map(_root, split.values()) if root is not None}
    for root in sorted(roots):
        deeper = [other for other in roots if other != root and other[: len(root)] == root]
        inside = {
            ".".join(_unwrapped(segments[len(root) :])): tensors[name]
            for name, segments in split.items()
            if segments[: len(root)] == root and not any(segments[: len(other)] == other for other in deeper)
        }
        yield Branch((*_unwrapped(place), *_unwrapped(root)), inside)


def _root(segments: tuple[str, ...]) -> tuple[str, ...] | None:
    """The prefix before a patch embedding, its wrappers included; None of any other name."""
    kept = [number for number, segment in enumerate(segments) if segment not in WRAPPERS]
    for embedding in PATCH_EMBEDDINGS:
        last = kept[-len(embedding) :]
        if tuple(segments[number] for number in last) == embedding:
            return segments[: last[0]]
    return None


def _unwrapped(segments: Sequence[str]) -> tuple[str, ...]:
    return tuple(segment for segment in segments if segment not in WRAPPERS)


def _rank(segment: str) -> int:
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", segment)}
    if words & {"ema", "swa", "averaged"}:
        return EMA
    if "teacher" in words:
        return TEACHER
    if words & {"momentum", "target"} or segment in MOMENTUM_NAMES:
        return MOMENTUM
    if words & {"student", "online"} or segment in LAST_NAMES:
        return LAST
    return PLAIN
