"""Which of timm's ViTs an encoder may be, and all that differs between them.

VisionTransformer has learned positions (DINO, iBOT, MAE, DINOv2); Eva turns queries and keys by rotary ones
(DINOv3, arXiv:2508.10104; RoPE-ViT, arXiv:2403.13298). Prefix tokens (class token first, then any registers) have no
place in the image and are never turned.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from timm.layers import Attention, PatchEmbed, apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional as F

ViT = VisionTransformer | Eva


def checked(model: Any, name: str) -> ViT:
    """`model`, if tokens and class attention can be read off it.

    Raises:
        ValueError: It is another architecture, its blocks are no plain pre-norm ones, or it has no class token.
    """
    blocks = getattr(model, "blocks", [])
    if isinstance(model, VisionTransformer):
        plain = all(isinstance(block, Block) and isinstance(block.attn, Attention) for block in blocks)
    elif isinstance(model, Eva):
        plain = all(isinstance(block, EvaBlock) and getattr(block.attn, "num_kv_groups", 1) == 1 for block in blocks)
    else:
        plain = False
    if not plain or not isinstance(model.patch_embed, PatchEmbed):
        raise ValueError(f"{name} is no plain ViT of timm; expected a vit_... (DINOv2 and DINOv3 too) or deit_...")
    if model.cls_token is None:
        raise ValueError(f"{name} has no class token to read the attention of; choose a ViT that has one")
    return model


def embed(
    model: ViT, pixels: Float[Tensor, "batch 3 size size"], ids_visible: Int64[Tensor, "batch kept"] | None = None
) -> tuple[Float[Tensor, "batch tokens dim"], list[Float[Tensor, "..."] | None]]:
    """What the first block reads, and how each block turns the patches (None: it does not).

    A rotation is (heads or 1, patches, 2 · head width); with `ids_visible`, which leaves only those patches and the
    prefix, it has a batch axis in front.
    """
    embedded: Any = model._pos_embed(model.patch_embed(pixels))
    x, rotation = embedded if isinstance(model, Eva) else (embedded, None)
    if rotation is not None and not model.rope_mixed:  # mixed: every block and head has its own
        rotation = rotation[None, None]
    if ids_visible is not None:
        prefix, index = model.num_prefix_tokens, ids_visible[..., None].expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, :prefix], x[:, prefix:].gather(1, index)], dim=1)
        if rotation is not None:
            rotation = rotation[:, :, ids_visible].transpose(1, 2)
    depth = len(model.blocks)
    if rotation is None:
        return model.norm_pre(x), [None] * depth
    return model.norm_pre(x), list(rotation.expand(depth, *rotation.shape[1:]))


def class_attention(
    attn: Any, normed: Float[Tensor, "batch tokens dim"], rotation: Tensor | None = None
) -> Float[Tensor, "batch heads tokens"]:
    """The class token's row of a block's attention, and no other row: softmax(q_class kᵀ / √d), patch keys turned."""
    q_weight, q_bias, k_weight, k_bias = query_and_key(attn)
    shape = (len(normed), -1, attn.num_heads, len(q_weight) // attn.num_heads)
    q = attn.q_norm(F.linear(normed[:, :1], q_weight, q_bias).reshape(shape).transpose(1, 2))
    k = attn.k_norm(F.linear(normed, k_weight, k_bias).reshape(shape).transpose(1, 2))
    if rotation is not None:
        prefix = attn.num_prefix_tokens
        turned = apply_rot_embed_cat(k[:, :, prefix:], rotation, half=attn.rotate_half)
        k = torch.cat([k[:, :, :prefix], turned], dim=2)
    return (q.float() * attn.scale @ k.float().transpose(-2, -1)).softmax(dim=-1).squeeze(2)


def query_and_key(attn: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Weight and bias of the queries, then of the keys: timm keeps them apart, fused, or fused with biases apart."""
    if attn.qkv is None:
        return attn.q_proj.weight, attn.q_proj.bias, attn.k_proj.weight, attn.k_proj.bias
    q_weight, k_weight, _ = attn.qkv.weight.chunk(3)
    if getattr(attn, "q_bias", None) is not None:
        return q_weight, attn.q_bias, k_weight, attn.k_bias
    if attn.qkv.bias is None:
        return q_weight, None, k_weight, None
    q_bias, k_bias, _ = attn.qkv.bias.chunk(3)
    return q_weight, q_bias, k_weight, k_bias
