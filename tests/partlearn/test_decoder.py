"""Eq. 3 and 4, what the learner's loss trains, and labels of mirror images."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import photographs
from oracle import GRID, PARTS, Oracle, painted, read_all

from encoders.frozen import Encoder
from encoders.load import load_encoder
from partlearn.config import LearnConfig
from partlearn.crops import TokenCrop, TokenCrops
from partlearn.decoder import AdaIN, ImageDecoder
from partlearn.initialise import start
from partlearn.learner import PartLearner, load_learner
from partlearn.losses import pixel_loss
from partlearn.train import learn, new_learner, parts_loss
from shards.images import list_images
from training.config import RunConfig


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_adain_starts_as_a_normalisation_of_each_channel_of_each_image():
    x = 3 + 5 * torch.randn(2, 4, 6, 6, generator=seeded()) * torch.tensor([1.0, 0.2])[:, None, None, None]

    y = AdaIN(8, 4)(x, torch.zeros(2, 8))

    deviation, mean = torch.std_mean(y, dim=(2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(2, 4), atol=1e-5)
    assert torch.allclose(deviation, torch.ones(2, 4), atol=1e-4)


def test_adain_starts_near_that_for_any_class_token():
    x, class_token = torch.randn(2, 4, 6, 6, generator=seeded()), torch.randn(2, 8, generator=seeded(1))

    y = AdaIN(8, 4)(x, class_token)

    deviation, mean = torch.std_mean(y, dim=(2, 3), correction=0)
    bound = 6 * 0.02 * class_token.norm(dim=1, keepdim=True)
    assert (mean.abs() < bound).all()
    assert ((deviation - 1).abs() < bound).all()


def test_adain_is_eq_3_written_out():
    adain, x, class_token = AdaIN(8, 3), torch.randn(2, 3, 5, 4), torch.randn(2, 8)
    torch.nn.init.normal_(adain.style.weight)

    y = adain(x, class_token).detach().numpy()

    weight, bias = (tensor.detach().numpy() for tensor in (adain.style.weight, adain.style.bias))
    for image in range(2):
        style = weight @ class_token[image].numpy() + bias
        for channel in range(3):
            own = x[image, channel].numpy()
            scale, shift = style[channel], style[3 + channel]
            expected = scale * (own - own.mean()) / np.sqrt(own.var() + 1e-5) + shift
            assert y[image, channel] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_decoder_reads_maps_and_class_token_of_the_same_image():
    """Images whose shapes are in the maps and whose colours are in the class token; either of another is worse."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = ImageDecoder(6, 3, grid=8, size=8)
        maps = (4 * torch.randn(6, 3, 4, 4)).softmax(dim=1).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        class_token, colours = torch.eye(6), torch.randn(6, 3, 3)
    images = torch.einsum("bnhw,bnc->bchw", maps, colours)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)

    def loss(maps: torch.Tensor, class_token: torch.Tensor) -> torch.Tensor:
        return pixel_loss(decoder(maps, class_token), images)

    with torch.no_grad():
        before, fresh = loss(maps, class_token).item(), decoder(maps, class_token)
        assert not torch.allclose(decoder(maps.roll(1, 0), class_token), fresh)
        assert not torch.allclose(decoder(maps, class_token.roll(1, 0)), fresh)
    for _ in range(50):
        optimizer.zero_grad()
        loss(maps, class_token).backward()
        optimizer.step()

    with torch.no_grad():
        own = loss(maps, class_token).item()
        assert own < before / 2
        assert loss(maps.roll(1, 0), class_token).item() > 2 * own
        assert loss(maps, class_token.roll(1, 0)).item() > 2 * own


FORMS = {"default": {"kinds": 1}, "paper": {"paper": True, "decoder_size": 8}}


def at_work(form: str, folder: Path) -> tuple[PartLearner, LearnConfig, Encoder, TokenCrop]:
    """A learner some way from its start, where products with zeros would hide gradients, and a batch."""
    images = photographs(folder / "photos", 4)
    run = RunConfig(out=folder / "run", device="cpu", precision="fp32")
    settings: dict[str, Any] = {"grid": 4, "num_parts": 3, "crops": 1, "batch_size": 4} | FORMS[form]
    config = LearnConfig(images=str(images), encoder="random:vit_tiny_patch16_224", run=run, **settings)
    encoder = load_encoder(config.encoder, grid=4, precision="fp32")
    encoder.model.requires_grad_(True)  # were it not frozen by how it is called, gradients would reach it
    views = TokenCrops(config, encoder, list_images(images))
    learner = new_learner(config, encoder)
    start(learner, config, encoder, views)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded()))
    crops = torch.randint(0, 256, (4, 64, 64, 3), generator=seeded(), dtype=torch.uint8)
    return learner, config, encoder, TokenCrop(crops, encoder(crops))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_all_that_is_trained_and_nothing_of_the_encoder(form, tmp_path):
    learner, config, encoder, view = at_work(form, tmp_path)
    before = copy.deepcopy(encoder.model.state_dict())

    parts_loss(learner, config, encoder, view)[0].backward()

    assert all(parameter.grad is None for parameter in encoder.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in encoder.model.state_dict().items())
    reached = {name for name, one in learner.named_parameters() if one.grad is not None and one.grad.abs().max() > 1e-5}
    trained = {name for name, one in learner.named_parameters() if one.requires_grad}
    assert trained - reached == set(without_effect(learner, config))
    assert ("attention.prototypes" in trained) == (form == "default")


def without_effect(learner: PartLearner, config: LearnConfig) -> list[str]:
    """What the mathematics leaves no gradient: a constant under a softmax over positions, and one before AdaIN."""
    constants = [name for name, _ in learner.named_parameters() if ".convs." in name and name.endswith(".bias")]
    shifts = ["attention.key_bias"] if config.projections == "part" else []
    return [*constants, *shifts] if config.softmax == "positions" else []


EVERYWHERE = {
    "init": "random",
    "relative": False,
    "whiten": 0,
    "diffusion": 0,
    "softmax": "positions",
    "where": "everywhere",
    "background": False,
}


@pytest.mark.parametrize("changes", [{}, EVERYWHERE | {"steps": 30}], ids=["default", "everywhere"])
def test_labels_of_a_mirror_image_are_the_mirrored_labels(changes, tmp_path):
    oracle = Oracle(noise=0.0)
    config = LearnConfig(
        images=str(painted(tmp_path / "images", 12)),
        encoder="oracle",
        grid=GRID,
        num_parts=PARTS,
        crops=1,
        batch_size=12,
        run=RunConfig(out=tmp_path / "run", device="cpu", precision="fp32"),
        **changes,
    )
    learn(config, encoder=oracle)
    learner, _, _ = load_learner(tmp_path / "run")
    images = read_all(tmp_path / "images")

    labels, _ = learner.label(oracle(images))
    mirrored, _ = learner.label(oracle(images.flip(2)))

    assert len(labels.unique()) >= 3
    assert torch.equal(mirrored.unflatten(1, (GRID, GRID)).flip(2).flatten(1), labels)
