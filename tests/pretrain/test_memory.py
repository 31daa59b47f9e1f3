"""How many images a GPU takes at once: arithmetic, held against what PyTorch keeps."""

from pathlib import Path

import pytest
import torch

from pretrain.config import PretrainConfig, StreamRun
from pretrain.memory import bytes_per_image, images_at_once
from pretrain.presets import PRESETS, SetShape
from pretrain.train import build

IMAGENET = SetShape(1_281_167, 224, 28)
SMALL = {"embed_dim": 96, "depth": 6, "heads": 3, "decoder_dim": 64, "decoder_depth": 4, "decoder_heads": 4}


def config(**settings) -> PretrainConfig:
    return PretrainConfig(data="x", run=StreamRun(out=Path("x")), **settings)


def kept_by_pytorch(settings: PretrainConfig, *, patches: int, masked: int, predicted: int, images: int = 2) -> float:
    """Bytes an image that the forward pass keeps, those of weights apart."""
    model, kept = build(settings, 64), {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    casts = 2 * sum(weight.numel() for weight in model.parameters())
    ids = torch.arange(patches).expand(images, -1)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(images, 3, 64, 64), ids[:, masked:], ids[:, :predicted])
    return (sum(nbytes for nbytes, _ in kept.values()) - casts) / images


@pytest.mark.parametrize("predicted", [None, 32])
def test_the_estimate_is_what_pytorch_keeps(predicted):
    settings = config(patch=4, predicted=predicted, **SMALL)

    measured = kept_by_pytorch(settings, patches=256, masked=192, predicted=predicted or 192)

    assert bytes_per_image(settings, 64, bf16=True) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("name", "gigabytes", "images"),
    [("semmae-b16", 80, 512), ("semmae-b16", 24, 128), ("semmae-b8-foreground", 80, 512), ("small", 16, 256)],
)
def test_half_of_the_memory_is_filled(name, gigabytes, images):
    settings = config(**PRESETS[name](IMAGENET))

    assert images_at_once(settings, 224, memory=gigabytes * 10**9, bf16=True) == images
    assert images_at_once(settings, 224, memory=gigabytes * 10**9, bf16=False) == images // 2


def test_a_second_decoder_is_counted():
    plain, hpm = (bytes_per_image(config(masking=name), 224, bf16=True) for name in ("random", "hpm"))

    assert hpm - plain == 40 * 8 * 512 * (1 + 196)


def test_one_image_is_always_taken():
    assert images_at_once(config(), 224, memory=1, bf16=True) == 1
