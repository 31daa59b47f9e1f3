"""Floating-point operations of masked pretraining, counted as MAE's own code spends them (arXiv:2111.06377).

An implementation may save some of them (ours embeds visible patches alone); the count stays, so that a share of a
card's rate says how fast images go through, whoever computes them.
"""

from pretrain.config import PretrainConfig
from pretrain.masking.patches import kept_count


def step_flops(config: PretrainConfig, size: int) -> float:
    """Of one image and step, multiplications and additions apart; forward, and twice that backward. What a masking
    spends that learns is not counted.

        block(n, d) = 24 n d² + 4 n² d           four projections and an MLP of 4 d; two products of attention
        forward     = 2 L · 3p² · d + depth · block(1 + visible, d) + 2 (1 + visible) d d'
                      + depth' · block(1 + visible + predicted, d') + 2 (1 + visible + predicted) d' · 3p²

    58.7e9 for ViT-B/16 at 224 px with a decoder of 8 blocks, 512 wide, and three quarters masked and predicted; 42.2e9
    where 49 of the 147 are.
    """
    side = size // config.patch
    kept = kept_count((side, side), config.keep_share)
    visible, pixels = int(kept * (1 - config.mask_ratio)), 3 * config.patch**2
    decoded = visible + min(kept - visible, config.predicted or kept)
    dim, narrow = config.embed_dim, config.decoder_dim
    forward = (
        2 * side * side * pixels * dim
        + config.depth * block_flops(1 + visible, dim)
        + 2 * (1 + visible) * dim * narrow
        + config.decoder_depth * block_flops(1 + decoded, narrow)
        + 2 * (1 + decoded) * narrow * pixels
    )
    return 3.0 * forward


def block_flops(tokens: int, dim: int) -> int:
    """Of a transformer's block, forward."""
    return 24 * tokens * dim**2 + 4 * tokens**2 * dim
