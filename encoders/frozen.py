"""A frozen ViT: class token, patch tokens, tokens as any block reads them, class attention."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from encoders.architecture import ViT, class_attention, embed
from encoders.weights import fingerprint
from training.device import autocast

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the part learner sees of an image."""

    class_token: Float[Tensor, "batch dim"]
    """After the final norm."""
    patch_tokens: Float[Tensor, "batch patches dim"]
    """After the final norm."""
    block_tokens: Float[Tensor, "batch tokens dim"]
    """Class token, then patches (registers dropped), as the chosen block reads them: after its first norm. Where the
    number of blocks is chosen, as after the final norm."""
    class_attention: Float[Tensor, "batch heads patches"]
    """The class token's attention in the last block, computed in fp32 in any precision; a row sums to less than 1, the
    prefix tokens keep the rest."""


class Encoder:
    """A frozen ViT on square images. Computes without gradients, in eval mode, and returns fp32."""

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
        self.std = torch.tensor(std, device=device).reshape(3, 1, 1)
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

    def prepared(self, images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 size size"]:
        """Images at the encoder's size (antialiased bilinear), minus its mean, over its deviation."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        if pixels.shape[-1] != self.size or pixels.shape[-2] != self.size:
            pixels = F.interpolate(
                pixels, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        return (pixels - self._mean) / self.std

    @torch.no_grad()
    def __call__(
        self,
        images: UInt8[Tensor, "batch height width 3"],
        ids_visible: Int64[Tensor, "batch kept"] | None = None,
    ) -> Tokens:
        """Tokens of a batch; with `ids_visible`, of those patches alone (the model then sees no others)."""
        prefix = self.model.num_prefix_tokens
        ids_visible = None if ids_visible is None else ids_visible.to(self.device)
        with autocast(self.device, self.precision):
            x, rotations = embed(self.model, self.prepared(images), ids_visible)
            seen = attention = x
            for number, (block, rotation) in enumerate(zip(self.blocks, rotations, strict=True)):
                if number == self.block:
                    seen = block.norm1(x)
                if number == self.depth - 1:
                    with torch.autocast(self.device.type, enabled=False):  # casts what is fp32 back to bf16
                        attention = class_attention(block.attn, block.norm1(x.float()), rotation)
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
