"""The ViT that the verb `encoder` trains, and its tokens."""

import torch
from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from partlearn.config import EncoderConfig


def new_student(config: EncoderConfig) -> VisionTransformer:
    """Weights from torch's global generator; takes crops of any size that is a multiple of the patch."""
    return VisionTransformer(
        img_size=config.size,
        patch_size=config.patch,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=0,
        dynamic_img_size=True,
    )


def vit_tokens(
    model: VisionTransformer,
    images: Float[Tensor, "batch 3 height width"],
    masks: Bool[Tensor, "batch patches"] | None = None,
    mask_token: Float[Tensor, " dim"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Class and patch tokens after the final norm; hidden patches enter as the mask token at their positions."""
    x = model.patch_embed(images)
    if masks is not None and mask_token is not None:
        x = torch.where(masks.reshape(x.shape[:3])[..., None], mask_token.to(x.dtype), x)
    return model.norm(model.blocks(model.norm_pre(model._pos_embed(x))))
