"""The frozen encoder that a source names: the builtin one, timm, official files, our runs, a random control."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from encoders import normalisation
from encoders.architecture import checked
from encoders.frozen import CPU, Encoder
from encoders.normalisation import IMAGENETS, Normalisation, timm_cfg
from encoders.shape import Shape, shape_of
from encoders.weights import (
    Weights,
    load_strictly,
    numbers_of,
    patch_of,
    read_run,
    read_weights,
    refuse_other_shape,
)
from training import distributed
from training.checkpoint import CheckpointError

SOURCES = "builtin, timm:NAME, timm:NAME=FILE, ibot:FILE, dino:FILE, run:DIR or random:NAME"
BUILTIN = Path(__file__).parent / "builtin"
"""What comes with the project (its README.md is the model card): an encoder, and six parts learned on it."""


def load_encoder(
    source: str,
    *,
    grid: int | None = None,
    size: int | None = None,
    block: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device = CPU,
    precision: str = "auto",
) -> Encoder:
    """The encoder that `source` names, for images of `size` pixels or for `grid` patches a side.

    Args:
        source: builtin (comes with the project) · timm:NAME (hub) · timm:NAME=FILE · ibot:FILE · dino:FILE
            (official .pth) · run:DIR (ours) · random:NAME (control).
        block: The block whose input tokens are wanted, from 0; the number of blocks means after the final norm, and
            None the last block.
        mean, std: Normalisation of its pixels, in [0, 1]. Default: that of the weights' training, as the source or the
            file says it.

    Raises:
        ValueError: The source is none of these, its architecture is unknown, the size does not fit its patches, or
            `mean` and `std` are not those of one of our runs.
        FileNotFoundError: The file or run is not there.
        CheckpointError: The weights do not fit the architecture, or the hub cannot be reached.
    """
    told = normalisation.asked(mean, std)
    found = weights_of(source, told)
    patch = patch_of(found.weights)
    size = grid * patch if grid else size or found.native
    if size % patch:
        raise ValueError(f"{source} has patches of {patch} px, which do not divide {size} px; choose a multiple")
    model = found.build(size)
    positions = load_strictly(model, found.weights, source)
    return Encoder(
        model,
        source=source,
        size=size,
        block=block,
        mean=found.normalisation.mean,
        std=found.normalisation.std,
        positions=positions,
        device=device,
        precision=precision,
    )


@dataclass(frozen=True, slots=True)
class Found:
    """What a source gives."""

    weights: dict[str, Tensor]
    build: Callable[[int], Any]
    """A model for images of so many pixels a side."""
    native: int
    """Side in pixels that the weights are for."""
    normalisation: Normalisation
    file: Weights | None = None
    """What a file or run holds, with what is stored beside the backbone."""


def weights_of(source: str, told: Normalisation | None = None) -> Found:
    """What `source` names, not loaded into a model yet; see `load_encoder`."""
    kind, _, name = source.partition(":")
    if source == "builtin":
        kind, name = "run", str(BUILTIN / "encoder.safetensors")
    if not name or kind not in ("timm", "ibot", "dino", "run", "random"):
        raise ValueError(f"an encoder source must be {SOURCES}, got {source!r}")
    if kind == "run":
        return _of_run(Path(name), source, told)
    if kind in ("ibot", "dino"):
        weights = read_weights(Path(name), official=True)
        _log(weights, name)
        build = _builder(**numbers_of(weights.tensors, name))
        return Found(weights.tensors, build, 224, told or IMAGENETS, weights)
    architecture, _, file = name.partition("=")
    native = timm_cfg(architecture).input_size[-1]
    with torch.device("meta"):  # what is no ViT is refused before anything is fetched
        model = checked(timm.create_model(architecture, pretrained=False, num_classes=0), architecture)
    if not file:
        weights = _hub_or_random(kind, architecture)
        return Found(weights, _timm_builder(architecture), native, told or normalisation.of_timm(architecture))
    return _of_file(Path(file), architecture, shape_of(model.state_dict()), native, told)


def _of_run(path: Path, source: str, told: Normalisation | None) -> Found:
    weights = read_run(path)
    vit = weights.header["vit"]
    own = Normalisation(tuple(vit["mean"]), tuple(vit["std"]), "the run")
    if told is not None and (told.mean, told.std) != (own.mean, own.std):
        raise ValueError(
            f"{source} was trained with mean {own.mean} and deviation {own.std}; leave --encoder-mean and "
            "--encoder-std out"
        )
    names = ("patch_size", "embed_dim", "depth", "num_heads")
    return Found(weights.tensors, _builder(**{name: vit[name] for name in names}), vit["img_size"], own, weights)


def _of_file(path: Path, architecture: str, shape: Shape | None, native: int, told: Normalisation | None) -> Found:
    weights = read_weights(path, wanted=shape)
    refuse_other_shape(weights, shape, path, architecture)
    chosen = told or normalisation.of_file(path, weights, architecture)
    _log(weights, str(path), chosen.source)
    if not chosen.source and distributed.is_main():
        print(normalisation.warning(path, architecture), file=sys.stderr)
    return Found(weights.tensors, _timm_builder(architecture, weights.heads), native, chosen, weights)


def _log(weights: Weights, file: str, normalised: str = "") -> None:
    """One line on what was taken of a file that is not the backbone alone."""
    if not (weights.place or weights.others or "beside" in normalised) or not distributed.is_main():
        return
    others = f", not those under {', '.join(weights.others)}" if weights.others else ""
    heads = f", with {weights.heads} heads as there" if weights.heads else ""
    mean = f"; mean and deviation: {normalised}" if normalised else ""
    print(f"{file}: weights under {weights.place or 'its top'}{others}{heads}{mean}", file=sys.stderr)


def _builder(*, patch_size: int, embed_dim: int, depth: int, num_heads: int):
    def build(size: int) -> VisionTransformer:
        return VisionTransformer(
            img_size=size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=0,
        )

    return build


def _timm_builder(architecture: str, heads: int | None = None):
    others: dict[str, Any] = {} if heads is None else {"num_heads": heads}

    def build(size: int) -> Any:
        return timm.create_model(architecture, pretrained=False, num_classes=0, img_size=size, **others)

    return build


def _hub_or_random(kind: str, architecture: str) -> dict[str, Tensor]:
    """State dict of a hub model, or of one drawn at random with seed 0 (LayerScale 1, or blocks would do nothing)."""
    if kind == "timm":
        try:
            return timm.create_model(architecture, pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # whatever the hub's client raises, it means the same to the user
            raise CheckpointError(
                f"the weights of {architecture} could not be fetched ({type(error).__name__}); without the internet, "
                f"copy the file here and name it as timm:{_with_tag(architecture)}=FILE"
            ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = timm.create_model(architecture, pretrained=False, num_classes=0).state_dict()
    scales = (".ls1.gamma", ".ls2.gamma", ".gamma_1", ".gamma_2")
    return {n: torch.ones_like(w) if n.endswith(scales) else w for n, w in weights.items()}


def _with_tag(architecture: str) -> str:
    """NAME.TAG, which says whose weights, and so by what mean and deviation."""
    tag = timm_cfg(architecture).tag
    return architecture if "." in architecture or not tag else f"{architecture}.{tag}"
