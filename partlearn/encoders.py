"""Any source of a frozen ViT: class token, patch tokens, tokens as any block reads them, class attention."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, Int64, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from partlearn.architecture import ViT, checked, class_attention, embed
from partlearn.weights import fingerprint, load_strictly, numbers_of, patch_of, read_run, read_weights
from training.augment import IMAGENET_MEAN, IMAGENET_STD
from training.checkpoint import CheckpointError
from training.device import autocast

CPU = torch.device("cpu")
SOURCES = "small, timm:NAME, timm:NAME=FILE, ibot:FILE, dino:FILE, run:DIR or random:NAME"
SMALL = Path(__file__).parent / "small"
"""What comes with the project (its README.md is the model card): an encoder, and six parts learned on it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the part learner sees of a picture."""

    class_token: Float[Tensor, "batch dim"]
    """After the final norm."""
    patch_tokens: Float[Tensor, "batch patches dim"]
    """After the final norm."""
    block_tokens: Float[Tensor, "batch tokens dim"]
    """Class token, then patches (registers dropped), as the chosen block reads them: after its first norm. Where the
    number of blocks is chosen, as after the final norm."""
    class_attention: Float[Tensor, "batch heads patches"]
    """The class token's attention in the last block; a row sums to less than 1, the prefix tokens keep the rest."""


class Encoder:
    """A frozen ViT on square pictures. Computes without gradients, in eval mode, and returns fp32."""

    def __init__(
        self,
        model: ViT,
        *,
        source: str,
        size: int,
        block: int | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        positions: str,
        device: torch.device,
        precision: str,
    ):
        self.model = model.eval().requires_grad_(False).to(device)
        self.dim, self.depth = model.embed_dim, len(model.blocks)
        self.blocks: list[Any] = list(model.blocks)
        self.heads = self.blocks[-1].attn.num_heads
        self.patch = int(model.patch_embed.patch_size[0])
        self.size, self.grid = size, size // self.patch
        self.block = self.depth - 1 if block is None else block
        if not 0 <= self.block <= self.depth:
            raise ValueError(f"encoder_block must lie between 0 and {self.depth} for {source}, got {block}")
        self.device, self.precision = device, precision
        self._mean = torch.tensor(mean, device=device).reshape(3, 1, 1)
        self._std = torch.tensor(std, device=device).reshape(3, 1, 1)
        self.fingerprint = fingerprint(model.state_dict())
        self.description: dict[str, Any] = {
            "source": source,
            "weights_sha256": self.fingerprint,
            "dim": self.dim,
            "depth": self.depth,
            "heads": self.heads,
            "patch": self.patch,
            "size": size,
            "grid": self.grid,
            "block": self.block,
            "mean": list(mean),
            "std": list(std),
            "positions": positions,
        }

    def normalised(self, images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 size size"]:
        """Pictures at the encoder's size (antialiased bilinear), minus its mean, over its deviation."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        if pixels.shape[-1] != self.size or pixels.shape[-2] != self.size:
            pixels = F.interpolate(
                pixels, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        return (pixels - self._mean) / self._std

    @torch.no_grad()
    def __call__(
        self,
        images: UInt8[Tensor, "batch height width 3"],
        ids_keep: Int64[Tensor, "batch kept"] | None = None,
    ) -> Tokens:
        """Tokens of a batch; with `ids_keep`, of those patches alone (the model then sees no others)."""
        prefix = self.model.num_prefix_tokens
        ids_keep = None if ids_keep is None else ids_keep.to(self.device)
        with autocast(self.device, self.precision):
            x, rotations = embed(self.model, self.normalised(images), ids_keep)
            seen = attention = x
            for number, (block, rotation) in enumerate(zip(self.blocks, rotations, strict=True)):
                if number == self.block:
                    seen = block.norm1(x)
                if number == self.depth - 1:
                    attention = class_attention(block.attn, block.norm1(x), rotation)
                x = block(x) if rotation is None else block(x, rope=rotation)  # timm's plain blocks take no rope
            x = self.model.norm(x)
            if self.block == self.depth:
                seen = x
        return Tokens(
            class_token=x[:, 0].float(),
            patch_tokens=x[:, prefix:].float(),
            block_tokens=torch.cat([seen[:, :1], seen[:, prefix:]], dim=1).float(),
            class_attention=attention[:, :, prefix:].float(),
        )


def load_encoder(
    source: str,
    *,
    grid: int | None = None,
    size: int | None = None,
    block: int | None = None,
    device: torch.device = CPU,
    precision: str = "auto",
) -> Encoder:
    """The encoder that `source` names, for pictures of `size` pixels or for `grid` patches a side.

    Args:
        source: small (comes with the project) · timm:NAME (hub) · timm:NAME=FILE · ibot:FILE · dino:FILE
            (official .pth) · run:DIR (ours) · random:NAME (control).
        block: The block whose input tokens are wanted, from 0; the number of blocks means after the final norm, and
            None the last block.

    Raises:
        ValueError: The source is none of these, its architecture is unknown, or the size does not fit its patches.
        FileNotFoundError: The file or run is not there.
        CheckpointError: The weights do not fit the architecture, or the hub cannot be reached.
    """
    kind, _, name = source.partition(":")
    if source == "small":
        kind, name = "run", str(SMALL / "encoder.safetensors")
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
