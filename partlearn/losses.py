"""What the part learner minimises; one function an equation, all in fp32."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

PixelError = Literal["mean", "sum"]


def pixel_loss(
    rebuilt: Float[Tensor, "batch 3 height width"],
    image: Float[Tensor, "batch 3 height width"],
    channels: PixelError = "mean",
) -> Float[Tensor, ""]:
    """Eq. 5: squared error, averaged over pixels, and its mean or (as printed) its sum over the channels: three times
    the mean, against which Eq. 6 weighs a third."""
    return F.mse_loss(rebuilt.float(), image.float()) * (image.shape[1] if channels == "sum" else 1)


def feature_loss(
    maps: Float[Tensor, "batch parts patches"],
    vectors: Float[Tensor, "parts dim"],
    tokens: Float[Tensor, "batch patches dim"],
    inside: Bool[Tensor, "batch patches"],
) -> Float[Tensor, ""]:
    """Each inside token against the mean of part vectors by its shares, over the tokens' own squared length:

        sum_p |f(p) - sum_i M_i(p) v_i|²  /  sum_p |f(p)|²        in each image; the mean over images

    In place of Eq. 5: pixels reward a colour code, tokens reward parts (docs/log.md).
    """
    shares = maps / maps.sum(dim=1, keepdim=True).clamp(min=1e-6)
    rebuilt = shares.transpose(1, 2) @ vectors
    weight = inside[..., None].float()
    missed, whole = (((tokens - part).square() * weight).sum(dim=(1, 2)) for part in (rebuilt, 0))
    return (missed / whole.clamp(min=1e-6)).mean()


def pairwise_cosine(maps: Float[Tensor, "batch parts patches"]) -> Float[Tensor, "batch parts parts"]:
    """cos(m_i, m_j) of an image's maps; norms are held above 1e-6."""
    unit = maps.float() / maps.float().norm(dim=2, keepdim=True).clamp(min=1e-6)
    return unit @ unit.transpose(1, 2)


def diversity_loss(maps: Float[Tensor, "batch parts patches"]) -> Float[Tensor, ""]:
    """Eq. 6: (1/N²) · sum over i≠j of cos²(m_i, m_j), an image at a time; 0 for disjoint maps, (N-1)/N for equal."""
    parts = maps.shape[1]
    cosine = pairwise_cosine(maps)
    between = cosine.square() * (1 - torch.eye(parts, device=maps.device))
    return between.sum(dim=(1, 2)).mean() / parts**2


def balance_loss(
    maps: Float[Tensor, "batch parts patches"], inside: Bool[Tensor, "batch patches"]
) -> Float[Tensor, ""]:
    """How far the parts' use over the batch is from equal: KL(use ‖ 1/N) in nats.

    The softmax over parts needs it: Eq. 6 does not see a part that vanishes.
    """
    use = maps.sum(dim=(0, 2)) / inside.sum().clamp(min=1)
    use = (use / use.sum().clamp(min=1e-6)).clamp(min=1e-6)
    return (use * (use * maps.shape[1]).log()).sum()
