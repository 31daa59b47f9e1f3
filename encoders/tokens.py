"""The tokens of a ViT that is being trained, as timm computes them."""

import torch
from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def vit_tokens(
    model: VisionTransformer,
    images: Float[Tensor, "batch 3 height width"],
    masks: Bool[Tensor, "batch patches"] | None = None,
    mask_token: Float[Tensor, " dim"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Class and patch tokens after the final norm; masked patches enter as the mask token at their positions."""
    x = model.patch_embed(images)
    if masks is not None and mask_token is not None:
        x = torch.where(masks.reshape(x.shape[:3])[..., None], mask_token.to(x.dtype), x)
    return model.norm(model.blocks(model.norm_pre(model._pos_embed(x))))
