"""The encoder and the parts that come with the project."""

import numpy as np
import pytest
import torch

from encoders.export import export
from encoders.load import BUILTIN
from partlearn.labelling.learned import open_token_labeller
from training.checkpoint import load_tensors, write_tensors


@pytest.fixture(scope="module")
def labeller():
    return open_token_labeller("builtin", precision="fp32")


def things(count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Brown bottles off the centre of a green ground, and where they are: no photograph, but the object is plain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:224, :224]
    images, masks = [], []
    for number in range(count):
        left, top = (24, 30) if number % 2 else (120, 70)
        mask = (abs(x - left - 35) < np.where(y < top + 40, 14, 35)) & (y >= top) & (y < top + 130)
        ground = np.array([60, 120, 50]) + 12 * rng.standard_normal((224, 224, 1))
        thing = np.array([120, 70, 30]) + 40 * np.exp(-(((x - left - 25) / 12) ** 2))[..., None]
        images.append(np.where(mask[..., None], thing, ground).clip(0, 255).astype(np.uint8))
        masks.append(mask)
    return np.stack(images), np.stack(masks)


def test_both_together_weigh_at_most_twelve_megabytes():
    assert sum(file.stat().st_size for file in BUILTIN.iterdir()) <= 12e6


def test_the_parts_were_learned_on_that_encoder(labeller):
    """Else `Labeller` refuses."""
    assert (labeller.grid, labeller.groups) == (28, 7)
    assert labeller.encoder.description["source"] == "builtin"
    assert labeller.encoder.description["size"] == 392


def test_it_finds_an_object_off_the_centre(labeller):
    images, masks = things()

    labels = labeller(images)

    cells = masks.reshape(-1, 28, 8, 28, 8).mean(axis=(2, 4)) > 0.5
    best = labels.fgrank < cells.sum(axis=(1, 2), keepdims=True)
    assert (best & cells).sum() > 0.7 * cells.sum()


def test_its_labels_are_the_same_every_time(labeller):
    images, _ = things(2)

    one, two = labeller(images), open_token_labeller("builtin", precision="fp32")(images)

    assert np.array_equal(one.parts, two.parts)
    assert np.array_equal(one.fgrank, two.fgrank)


def test_the_card_says_what_the_files_say(labeller):
    card = (BUILTIN / "README.md").read_text()

    assert labeller.encoder.fingerprint[:12] in card
    assert labeller.sha256[:12] in card


def test_export_halves_the_bytes_and_keeps_the_encoder(tmp_path):
    full = {"cls_token": torch.randn(1, 1, 4), "norm.weight": torch.randn(4)}
    (tmp_path / "run").mkdir()
    write_tensors(tmp_path / "run/model.safetensors", full, {"vit": {"depth": 1}})

    export(tmp_path / "run", tmp_path / "half.safetensors")

    half, metadata = load_tensors(tmp_path / "half.safetensors")
    assert metadata == {"vit": {"depth": 1}}
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert all(torch.allclose(half[name].float(), tensor, atol=2e-3) for name, tensor in full.items())
