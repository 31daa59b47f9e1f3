"""Eq. 3 and 4 of SemMAE: the image back from where its parts are (maps) and what it looks like (class token)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

BLUR_SIDE, BLUR_SIGMA = 7, 1.4


def blur(maps: Float[Tensor, "batch parts rows cols"]) -> Float[Tensor, "batch parts rows cols"]:
    """A normalised 7x7 Gaussian of sigma 1.4, reflected at the borders (the paper says kernel 7 and no more).

    Grids too small to reflect by 3 cells repeat their border instead.
    """
    taps = torch.arange(BLUR_SIDE, device=maps.device, dtype=torch.float32) - BLUR_SIDE // 2
    taps = torch.exp(-(taps**2) / (2 * BLUR_SIGMA**2))
    taps = (taps / taps.sum()).to(maps.dtype)
    pad, parts = BLUR_SIDE // 2, maps.shape[1]
    mode = "reflect" if min(maps.shape[-2:]) > pad else "replicate"
    padded = F.pad(maps, (pad, pad, pad, pad), mode=mode)
    rows = F.conv2d(padded, taps.reshape(1, 1, -1, 1).expand(parts, 1, -1, 1), groups=parts)
    return F.conv2d(rows, taps.reshape(1, 1, 1, -1).expand(parts, 1, 1, -1), groups=parts)


class AdaIN(nn.Module):
    """Eq. 3: shift and scale of each channel come from the class token.

        y = scale(F_c) · (x - mean) / sqrt(variance + 1e-5) + shift(F_c)

    Statistics per image and channel, biased, in fp32; the paper's text says variance, its formula deviation.
    """

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.style = nn.Linear(dim, 2 * channels)
        nn.init.normal_(self.style.weight, std=0.02)
        self.style.bias.data = torch.cat([torch.ones(channels), torch.zeros(channels)])

    def forward(
        self, x: Float[Tensor, "batch channels rows cols"], class_token: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch channels rows cols"]:
        scale, shift = self.style(class_token).float()[..., None, None].chunk(2, dim=1)
        variance, mean = torch.var_mean(x.float(), dim=(2, 3), correction=0, keepdim=True)
        return scale * (x.float() - mean) * torch.rsqrt(variance + 1e-5) + shift


class Block(nn.Module):
    """Two convolutions with AdaIN at one resolution."""

    def __init__(self, dim: int, channels_in: int, channels: int):
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(channels_in, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)]
        )
        self.styles = nn.ModuleList([AdaIN(dim, channels), AdaIN(dim, channels)])

    def forward(
        self, x: Float[Tensor, "batch channels rows cols"], class_token: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch width rows cols"]:
        for conv, style in zip(self.convs, self.styles, strict=True):
            x = F.leaky_relu(style(conv(x), class_token), 0.2)
        return x


class ImageDecoder(nn.Module):
    """Eq. 4: blurred maps, convolved and doubled up to `size` pixels; no skip from the encoder, no noise."""

    def __init__(self, dim: int, parts: int, *, grid: int, size: int):
        super().__init__()
        doublings = (size // grid).bit_length() - 1
        widths = [256, 128, 64, 32, 32][: doublings + 1]
        self.blocks = nn.ModuleList(Block(dim, w_in, w) for w_in, w in zip([parts, *widths], widths, strict=False))
        self.to_pixels = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(
        self, maps: Float[Tensor, "batch parts rows cols"], class_token: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch 3 height width"]:
        x = blur(maps)
        for number, block in enumerate(self.blocks):
            if number:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(x, class_token)
        return self.to_pixels(x)
