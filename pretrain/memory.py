"""How many images a GPU takes through the model at once."""

from pretrain.config import PretrainConfig
from pretrain.masking.budget import masked_count
from pretrain.masking.patches import kept_count

BYTES_KEPT = 40
"""Kept for the backward pass, per token, channel and block, in bf16: 37 to 39 were measured for ViT-S/16, ViT-B/16,
ViT-B/8 on a quarter of its patches, and images of 64 px (saved tensors under autocast on a CPU, fused attention)."""


def bytes_per_image(config: PretrainConfig, size: int, *, bf16: bool) -> int:
    """What the forward pass of one image leaves for the backward pass.

    bytes = 40 · (depth · dim · visible tokens + decoder depth · decoder dim · decoder tokens),   twice that in fp32

    The decoder's tokens are the class, the visible and the predicted patches; hpm has a second decoder on them.
    """
    side = size // config.patch
    kept = kept_count((side, side), config.keep_share)
    masked = masked_count(kept, config.mask_ratio)
    visible, predicted = kept - masked, min(masked, config.predicted or masked)
    encoder = config.depth * config.embed_dim * (visible + 1)
    decoder = config.decoder_depth * config.decoder_dim * (visible + predicted + 1)
    decoders = 2 if config.masking == "hpm" else 1
    return BYTES_KEPT * (encoder + decoders * decoder) * (1 if bf16 else 2)


def images_at_once(config: PretrainConfig, size: int, *, memory: int, bf16: bool) -> int:
    """The power of two of images whose forward pass fills at most half of the memory; one at least.

    The other half is for weights, gradients, AdamW and what a step holds for a moment.
    """
    return 1 << max(0, (memory // 2 // bytes_per_image(config, size, bf16=bf16)).bit_length() - 1)
