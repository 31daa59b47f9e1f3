"""Any source of a frozen ViT: class token, patch tokens, tokens as any block reads them, class attention."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, Int64, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from partlearn.weights import fingerprint, read_run, read_weights, resize_positions
from training.checkpoint import CheckpointError
from training.device import autocast

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
SOURCES = "timm:NAME, timm:NAME=FILE, ibot:FILE, dino:FILE, run:DIR or random:NAME"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the part learner sees of a picture."""

    class_token: Float[Tensor, "batch dim"]
    """After the final norm."""
    patch_tokens: Float[Tensor, "batch patches dim"]
    """After the final norm."""
    block_tokens: Float[Tensor, "batch tokens dim"]
    """Class token, then patches, as the chosen block reads them: after its first norm."""
    class_attention: Float[Tensor, "batch heads patches"]
    """The class token's attention in the last block; a row sums to less than 1, the class token keeps the rest."""


class Encoder:
    """A frozen ViT on square pictures. Computes without gradients, in eval mode, and returns fp32."""

    def __init__(
        self,
        model: VisionTransformer,
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
        self.patch = model.patch_embed.patch_size[0]
        self.size, self.grid = size, size // self.patch
        self.block = self.depth - 1 if block is None else block
        if not 0 <= self.block < self.depth:
            raise ValueError(f"encoder_block must lie between 0 and {self.depth - 1} for {source}, got {block}")
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
        model = self.model
        prefix = model.num_prefix_tokens
        with autocast(self.device, self.precision):
            x = model._pos_embed(model.patch_embed(self.normalised(images)))
            if ids_keep is not None:
                index = ids_keep.to(self.device)[..., None].expand(-1, -1, x.shape[-1])
                x = torch.cat([x[:, :prefix], x[:, prefix:].gather(1, index)], dim=1)
            x = model.norm_pre(x)
            seen = attention = x
            for number, block in enumerate(self.blocks):
                if number == self.block:
                    seen = block.norm1(x)
                if number == self.depth - 1:
                    attention = class_attention(block.attn, block.norm1(x))
                x = block(x)
            x = model.norm(x)
        return Tokens(
            class_token=x[:, 0].float(),
            patch_tokens=x[:, prefix:].float(),
            block_tokens=torch.cat([seen[:, :1], seen[:, prefix:]], dim=1).float(),
            class_attention=attention[:, :, prefix:].float(),
        )


def class_attention(attn: Any, normed: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens"]:
    """The class token's row of a block's attention, and no other row: softmax(q_class kᵀ / √d)."""
    batch, _, dim = normed.shape
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q_bias, k_bias = (None, None) if bias is None else (bias[:dim], bias[dim : 2 * dim])
    shape = (batch, -1, attn.num_heads, dim // attn.num_heads)
    q = F.linear(normed[:, :1], weight[:dim], q_bias).reshape(shape).transpose(1, 2)
    k = F.linear(normed, weight[dim : 2 * dim], k_bias).reshape(shape).transpose(1, 2)
    q, k = attn.q_norm(q), attn.k_norm(k)
    return (q.float() * attn.scale @ k.float().transpose(-2, -1)).softmax(dim=-1).squeeze(2)


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
        source: timm:NAME (hub) · timm:NAME=FILE · ibot:FILE · dino:FILE · run:DIR (ours) · random:NAME (control).
        block: The block whose input tokens are wanted, from 0; the last one unless told.

    Raises:
        ValueError: The source is none of these, its architecture is unknown, or the size does not fit its patches.
        FileNotFoundError: The file or run is not there.
        CheckpointError: The weights do not fit the architecture, or the hub cannot be reached.
    """
    kind, _, name = source.partition(":")
    if not name or kind not in ("timm", "ibot", "dino", "run", "random"):
        raise ValueError(f"--encoder must be {SOURCES}, got {source!r}")
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
        weights, _ = read_weights(Path(name))
        numbers = _numbers_of(weights, name)
        native, build = 224, _builder(**numbers)
    else:
        cfg = _pretrained_cfg(architecture)
        mean, std, native = cfg["mean"], cfg["std"], cfg["input_size"][-1]
        build = _timm_builder(architecture)
        weights = read_weights(Path(file))[0] if file else _hub_or_random(kind, architecture)
    patch = _patch_of(weights, source)
    size = grid * patch if grid else size or native
    if size % patch:
        raise ValueError(f"{source} has patches of {patch} px, which do not divide {size} px; choose a multiple")
    model = build(size)
    positions = _load_strictly(model, weights, source)
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


def _load_strictly(model: VisionTransformer, weights: dict[str, Tensor], source: str) -> str:
    """Load every tensor or raise; returns how the positions were resized."""
    weights, grid = dict(weights), model.patch_embed.grid_size[0]
    note = "as stored"
    if "pos_embed" in weights and model.pos_embed is not None:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        stored = int((weights["pos_embed"].shape[1] - prefix) ** 0.5)
        weights["pos_embed"] = resize_positions(weights["pos_embed"], prefix=prefix, grid=grid)
        if stored != grid:
            note = f"{stored}x{stored} to {grid}x{grid}, bicubic, no antialias"
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong = [n for n in sorted(expected.keys() & weights.keys()) if expected[n].shape != weights[n].shape]
    if missing or extra or wrong:
        found = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", extra), ("of another shape", wrong))
            if names
        )
        raise CheckpointError(
            f"the weights of {source} do not fit its architecture: {found}; check the file and the name"
        )
    model.load_state_dict(weights)
    return note


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
    def build(size: int) -> VisionTransformer:
        model = timm.create_model(architecture, pretrained=False, num_classes=0, img_size=size)
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"{architecture} is no plain ViT of timm; expected a vit_... or deit_... architecture")
        return model

    return build


def _pretrained_cfg(architecture: str) -> dict[str, Any]:
    if not timm.is_model(architecture.split(".")[0]):
        close = ", ".join(timm.list_models(f"*{architecture[:12]}*")[:3])
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
                f"copy the file here and pass --encoder timm:{architecture}=FILE"
            ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = timm.create_model(architecture, pretrained=False, num_classes=0).state_dict()
    return {n: torch.ones_like(w) if n.endswith((".ls1.gamma", ".ls2.gamma")) else w for n, w in weights.items()}


def _numbers_of(weights: dict[str, Tensor], name: str) -> dict[str, int]:
    """A ViT's numbers read off official DINO or iBOT weights, whose heads are always 64 wide."""
    try:
        dim, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    except KeyError as error:
        raise CheckpointError(f"{name} is no ViT checkpoint of DINO or iBOT: {error.args[0]} is not in it") from None
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    return {"patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": max(1, dim // 64)}


def _patch_of(weights: dict[str, Tensor], source: str) -> int:
    if "patch_embed.proj.weight" not in weights:
        raise CheckpointError(f"{source} holds no ViT: patch_embed.proj.weight is not in it")
    return weights["patch_embed.proj.weight"].shape[-1]
