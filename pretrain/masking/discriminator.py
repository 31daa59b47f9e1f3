"""AutoMAE's discriminator of masks (arXiv:2303.06583): rectangles are real, what its generator makes is not."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from pretrain.masking.patches import Shape

LEAST = 12
"""Rows and columns that three convolutions need: 12 -> 6 -> 3 -> 1."""
CORNERS = 4
"""Draws of a rectangle: its area, its width, and its place across and down."""
INSIDE = 0.5
"""What a patch inside a rectangle has on top of its noise."""


class Discriminator(nn.Module):
    """Three spectrally normalised convolutions without bias: 4x4 by steps of 2, twice, and 3x3; 14 -> 7 -> 3 -> 1.

    LeakyReLU of 0.2 between them, no sigmoid after: it learns 1 for real and 0 for made by least squares.
    """

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            spectral_norm(nn.Conv2d(1, 16, kernel_size=4, stride=2, padding=1, bias=False)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1, bias=False)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(32, 1, kernel_size=3, bias=False)),
        )

    def forward(self, maps: Float[Tensor, "batch rows cols"]) -> Float[Tensor, " batch"]:
        """The mean output for each map; a grid below LEAST has zeros around it.

        The power iteration goes on in training mode: once a step here, in each of three calls in the released code.
        """
        down, across = (max(0, LEAST - side) for side in maps.shape[1:])
        padded = F.pad(maps, (across // 2, across - across // 2, down // 2, down - down // 2))
        return self.convolutions(padded[:, None]).mean(dim=(1, 2, 3))


def rectangles(draws: Float64[Tensor, "batch draws"], shape: Shape) -> Float[Tensor, "batch rows cols"]:
    """Real samples: the softmax over an image's patches of noise, and INSIDE more in a rectangle of any place.

    On 14x14 its area is uniform from 40 to 160 patches, its width from 4 to 10, and its height what the area then
    needs, or all rows. Other grids have the same share of the area and of the columns.

    Args:
        draws: In [0, 1): CORNERS of them, then one for each patch.
    """
    rows, cols = shape
    area, width, left, top = draws[:, :CORNERS].T
    area = 40 + (121 * area).floor()
    width = ((4 + (7 * width).floor()) * cols / 14).round().clamp(min=1)
    height = (area * rows * cols / (196 * width)).ceil().clamp(max=rows)
    across = _inside(left, width, cols)[:, None, :]
    down = _inside(top, height, rows)[:, :, None]
    weight = draws[:, CORNERS:] + INSIDE * (down & across).flatten(1)
    return weight.float().softmax(dim=1).unflatten(1, shape)


def _inside(place: Float64[Tensor, " batch"], length: Float64[Tensor, " batch"], side: int) -> Tensor:
    """Where a segment is, at `place` of the room that it has: [batch, side]."""
    start = (place * (side - length + 1)).floor()[:, None]
    places = torch.arange(side, device=place.device)
    return (places >= start) & (places < start + length[:, None])
