"""MAE's forward as its paper's code spends it: all patches are embedded, and all tokens predicted."""

import torch
from torch import Tensor

from pretrain.mae import MAE


def forward_of_mae(model: MAE, images: Tensor, *, mask_ratio: float, predicted: int | None = None) -> Tensor:
    """Positions, norms and the choice of patches are left out: nobody counts them."""
    x = model.encoder.patch_embed(images)
    visible = x[:, : int(x.shape[1] * (1 - mask_ratio))]
    x = torch.cat([model.encoder.cls_token, visible], dim=1)
    for block in model.encoder.blocks:
        x = block(x)
    x = model.decoder_embed(x)
    masked = model.mask_token.expand(1, predicted or model.rows * model.cols + 1 - x.shape[1], -1)
    x = torch.cat([x, masked], dim=1)
    for block in model.decoder_blocks:
        x = block(x)
    return model.decoder_pixels(x)
