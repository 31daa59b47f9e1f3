"""The mean and deviation that an encoder's images are normalised by: those its weights were trained with."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg

from encoders.weights import Weights
from shards.atomic import read_json
from training.augment import IMAGENET_MEAN, IMAGENET_STD

Channels = tuple[float, ...]
GOOGLES = (0.5, 0.5, 0.5)
"""timm's plain names stand for Google's weights, which have this mean; but everyone's ViTs fit those names."""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Of pixels between 0 and 1: minus the mean, over the deviation."""

    mean: Channels
    std: Channels
    source: str
    """What says so, for the log; empty where nothing does."""


IMAGENETS = Normalisation(IMAGENET_MEAN, IMAGENET_STD, "")


def asked(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation | None:
    """What --encoder-mean and --encoder-std say.

    Raises:
        ValueError: One is there without the other, or they are not of pixels between 0 and 1.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError("--encoder-mean and --encoder-std belong together; give both, or neither")
    if (
        len(mean) != 3
        or len(std) != 3
        or not all(0 <= one <= 1 for one in mean)
        or not all(0 < one <= 1 for one in std)
    ):
        raise ValueError(
            "--encoder-mean and --encoder-std are three numbers each, of pixels between 0 and 1 (255 is 1), got "
            f"{tuple(mean)} and {tuple(std)}"
        )
    return Normalisation(tuple(map(float, mean)), tuple(map(float, std)), "--encoder-mean and --encoder-std")


def timm_cfg(architecture: str) -> PretrainedCfg:
    """timm's settings of NAME (its default weights) or NAME.TAG.

    Raises:
        ValueError: timm has none.
    """
    name = architecture.split(".")[0]
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(["vit*", "deit*"])))
        raise ValueError(f"timm knows no architecture {architecture!r}{f'; close: {close}' if close else ''}")
    cfg = timm.get_pretrained_cfg(architecture)
    if cfg is None:
        raise ValueError(f"timm has no settings for {architecture!r}; check the part behind the dot")
    return cfg


def of_timm(architecture: str) -> Normalisation:
    """That of the weights which timm means by NAME or NAME.TAG."""
    cfg = timm_cfg(architecture)
    return Normalisation(tuple(cfg.mean), tuple(cfg.std), f"timm's {architecture}")


def of_file(path: Path, weights: Weights, architecture: str) -> Normalisation:
    """That of weights from a file of timm's `architecture`: the first of these that says.

    The tag in NAME.TAG; the file (a mean in its header or in its training's settings, or timm's name of the model);
    what lies beside it (timm's config.json, Hugging Face's preprocessor_config.json); its layout, which only Meta's
    code writes; an architecture whose weights are all of one origin (DINOv2, CLIP). Where none does, ImageNet's.
    """
    default = of_timm(architecture)
    if "." in architecture:
        return default
    said = _in_settings(weights) or _beside(path, architecture)
    if said is not None:
        return said
    if weights.layout:
        return Normalisation(IMAGENET_MEAN, IMAGENET_STD, f"ImageNet's, as in {weights.layout}")
    return IMAGENETS if default.mean == GOOGLES else default


def warning(path: Path, architecture: str) -> str:
    """What a user is told where nothing says."""
    tag = timm_cfg(architecture).tag
    mean, std = (" ".join(map(str, values)) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (
        f"warning: {path} does not say by which mean and deviation its weights want images normalised; ImageNet's are "
        f"taken ({mean}; {std}), so give others with --encoder-mean and --encoder-std, or name weights of timm's, as "
        f"in timm:{architecture}.{tag}=FILE"
    )


def _in_settings(weights: Weights) -> Normalisation | None:
    """In a safetensors header, or as timm's train.py saves its arguments."""
    settings = vars(weights.args) if isinstance(weights.args, argparse.Namespace) else weights.args
    for told in (weights.header, settings):
        if not isinstance(told, dict):
            continue
        if (found := _channels(told.get("mean"), told.get("std"))) is not None:
            return Normalisation(*found, "the file says")
    named = weights.header.get("arch") or weights.header.get("architecture")
    if isinstance(settings, dict) and "mean" in settings:  # None there: train.py took the model's own
        named = named or settings.get("model")
    if isinstance(named, str) and timm.is_model(named.split(".")[0]) and timm.get_pretrained_cfg(named) is not None:
        return of_timm(named)
    return None


def _beside(path: Path, architecture: str) -> Normalisation | None:
    for name, section, mean, std in (
        ("config.json", "pretrained_cfg", "mean", "std"),
        ("preprocessor_config.json", None, "image_mean", "image_std"),
    ):
        file = path.with_name(name)
        try:
            told = read_json(file)
        except (OSError, ValueError):  # not there, or of something else
            continue
        if section and (not isinstance(told, dict) or told.get("architecture") != architecture):
            continue  # of other weights in this folder
        told = told.get(section) if section and isinstance(told, dict) else told
        if isinstance(told, dict) and (found := _channels(told.get(mean), told.get(std))) is not None:
            return Normalisation(*found, f"{name} beside it says")
    return None


def _channels(mean: Any, std: Any) -> tuple[Channels, Channels] | None:
    values = (mean, std)
    if all(isinstance(one, list | tuple) and len(one) == 3 for one in values):
        return tuple(map(float, mean)), tuple(map(float, std))
    return None
