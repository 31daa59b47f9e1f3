"""Cells speak for cells like them: tokens averaged along the similarities inside an image."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.2


def diffused(
    tokens: Float[Tensor, "batch patches dim"], inside: Bool[Tensor, "batch patches"], rounds: int
) -> Float[Tensor, "batch patches dim"]:
    """`rounds` steps of a random walk over the inside cells of each image, which goes where tokens are alike:

        A = softmax(F Fᵀ / 0.2) over inside cells,        F ← unit(Aᵏ F)

    for unit tokens F; 0 rounds leave them as they are. A part's cells come to agree, which doubles what k-means tells
    of true parts (partlearn/RESULTS.md). Random walks on such graphs: TokenCut (arXiv:2202.11539) cuts them, and label
    propagation runs along them.
    """
    if not rounds:
        return tokens
    with torch.autocast(tokens.device.type, enabled=False):
        alike = tokens @ tokens.transpose(1, 2) / TEMPERATURE
        walk = alike.masked_fill_(~inside[:, None], -torch.inf).softmax(dim=2)
        for _ in range(rounds):
            tokens = walk @ tokens
    return F.normalize(tokens, dim=-1)
