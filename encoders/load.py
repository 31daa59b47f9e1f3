"""The frozen encoder that a source names: the builtin one, timm, official files, our runs, a random control."""

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from encoders.architecture import checked
from encoders.frozen import CPU, Encoder
from encoders.weights import load_strictly, numbers_of, patch_of, read_run, read_weights
from training.augment import IMAGENET_MEAN, IMAGENET_STD
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
    device: torch.device = CPU,
    precision: str = "auto",
) -> Encoder:
    """The encoder that `source` names, for images of `size` pixels or for `grid` patches a side.

    Args:
        source: builtin (comes with the project) · timm:NAME (hub) · timm:NAME=FILE · ibot:FILE · dino:FILE
            (official .pth) · run:DIR (ours) · random:NAME (control).
        block: The block whose input tokens are wanted, from 0; the number of blocks means after the final norm, and
            None the last block.

    Raises:
        ValueError: The source is none of these, its architecture is unknown, or the size does not fit its patches.
        FileNotFoundError: The file or run is not there.
        CheckpointError: The weights do not fit the architecture, or the hub cannot be reached.
    """
    kind, _, name = source.partition(":")
    if source == "builtin":
        kind, name = "run", str(BUILTIN / "encoder.safetensors")
    if not name or kind not in ("timm", "ibot", "dino", "run", "random"):
        raise ValueError(f"an encoder source must be {SOURCES}, got {source!r}")
    architecture, _, file = name.partition("=")
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if kind == "run":
        weights, vit = read_run(Path(name))
        native, mean, std = vit["img_size"], tuple(vit["mean"]), tuple(vit["std"])
        build = _builder(
            patch_size=vit["patch_size"],
            embed_dim=vit["embed_dim"],
            depth=vit["depth"],
            num_heads=vit["num_heads"],
        )
    elif kind in ("ibot", "dino"):
        weights, _ = read_weights(Path(name), official=True)
        native, build = 224, _builder(**numbers_of(weights, name))
    else:
        cfg = _pretrained_cfg(architecture)
        with torch.device("meta"):  # what is no ViT is refused before anything is fetched
            checked(timm.create_model(architecture, pretrained=False, num_classes=0), architecture)
        mean, std, native = cfg["mean"], cfg["std"], cfg["input_size"][-1]
        build = _timm_builder(architecture)
        weights = read_weights(Path(file))[0] if file else _hub_or_random(kind, architecture)
    patch = patch_of(weights, source)
    size = grid * patch if grid else size or native
    if size % patch:
        raise ValueError(f"{source} has patches of {patch} px, which do not divide {size} px; choose a multiple")
    model = build(size)
    positions = load_strictly(model, weights, source)
    return Encoder(
        model,
        source=source,
        size=size,
        block=block,
        mean=mean,
        std=std,
        positions=positions,
        device=device,
        precision=precision,
    )


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


def _timm_builder(architecture: str):
    def build(size: int) -> Any:
        return timm.create_model(architecture, pretrained=False, num_classes=0, img_size=size)

    return build


def _pretrained_cfg(architecture: str) -> dict[str, Any]:
    name = architecture.split(".")[0]
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(["vit*", "deit*"])))
        raise ValueError(f"timm knows no architecture {architecture!r}{f'; close: {close}' if close else ''}")
    cfg = timm.get_pretrained_cfg(architecture)
    if cfg is None:
        raise ValueError(f"timm has no settings for {architecture!r}; check the part behind the dot")
    return cfg.to_dict()


def _hub_or_random(kind: str, architecture: str) -> dict[str, Tensor]:
    """State dict of a hub model, or of one drawn at random with seed 0 (LayerScale 1, or blocks would do nothing)."""
    if kind == "timm":
        try:
            return timm.create_model(architecture, pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # whatever the hub's client raises, it means the same to the user
            raise CheckpointError(
                f"the weights of {architecture} could not be fetched ({type(error).__name__}); without the internet, "
                f"copy the file here and name it as timm:{architecture}=FILE"
            ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = timm.create_model(architecture, pretrained=False, num_classes=0).state_dict()
    scales = (".ls1.gamma", ".ls2.gamma", ".gamma_1", ".gamma_2")
    return {n: torch.ones_like(w) if n.endswith(scales) else w for n, w in weights.items()}
