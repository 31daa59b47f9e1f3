"""What a ViT is shown of bytes, whatever its source: each with the mean and deviation it was trained with."""

import pytest
import torch
from timm.layers import PatchEmbed
from watch import watching

from encoders.load import load_encoder

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("source", "statistics"),
    [("random:vit_tiny_patch16_224", HALF), ("random:deit_tiny_patch16_224", IMAGENET), ("builtin", IMAGENET)],
)
def test_bytes_over_255_less_the_sources_mean_over_its_deviation_enter_the_vit(source, statistics):
    encoder = load_encoder(source, grid=2, precision="fp32")
    images = torch.randint(0, 256, (2, encoder.size, encoder.size, 3), dtype=torch.uint8)

    with watching(PatchEmbed) as watched:
        encoder(images)

    ((shown,),) = watched.inputs
    mean, std = statistics
    for channel in range(3):
        expected = (images[..., channel].double() / 255 - mean[channel]) / std[channel]
        assert torch.allclose(shown[:, channel].double(), expected, atol=1e-5)
