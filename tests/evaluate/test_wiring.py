"""What `knn` and `probe` score and train on, beside features, votes and steps computed by hand."""

import io
import math

import numpy as np
import pytest
import torch
from conftest import write_set
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from watch import watching

from evaluate.config import KnnConfig, ProbeConfig
from evaluate.features import train_and_test
from evaluate.knn import knn
from evaluate.linear import probe
from shards.order import permutation
from shards.shard_set import ShardSet
from training.checkpoint import save

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
MEAN, STD, IMAGES = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), 120


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A set of noisy images in three colours, a tiny ViT of its own mean and deviation, and features by hand."""
    folder = tmp_path_factory.mktemp("wiring")
    data = write_set(folder / "shards", count=IMAGES, classes=3)
    torch.manual_seed(0)
    model = VisionTransformer(num_classes=0, **VIT).eval()
    vit = VIT | {"mean": list(MEAN), "std": list(STD), "source": "test"}
    save(folder / "run", 1, model.state_dict(), metadata={"vit": vit}, state={})
    return folder, {"checkpoint": str(folder / "run"), "data": str(data), "device": "cpu", "out": folder}, model


def by_hand(model: VisionTransformer, data: str, pool: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of stored pixels over 255, less the encoder's mean, over its deviation; and their classes."""
    with ShardSet.open(data) as shards:
        samples = [shards.read(index) for index in range(IMAGES)]
    pixels = np.stack([np.array(Image.open(io.BytesIO(sample.jpeg))) for sample in samples]) / 255
    pixels = torch.from_numpy((pixels - MEAN) / STD).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        tokens = model.forward_features(pixels)
    features = tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(dim=1)
    return features, torch.tensor([sample.class_id for sample in samples])


def held_out(seed: int) -> torch.Tensor:
    """Every fifth image of the order that the seed gives."""
    held = torch.zeros(IMAGES, dtype=torch.bool)
    held[permutation(IMAGES, seed=seed, epoch=0)[::5].tolist()] = True
    return held


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_features_are_the_tokens_asked_for_of_images_as_the_encoder_reads_them(pool, where):
    _, settings, model = where
    found = train_and_test(KnnConfig(pool=pool, seed=4, **settings))

    features, labels = by_hand(model, settings["data"], pool)
    held = held_out(4)
    assert torch.allclose(found.train, features[~held], atol=1e-4)
    assert torch.allclose(found.test, features[held], atol=1e-4)
    assert torch.equal(found.train_labels, labels[~held])
    assert torch.equal(found.test_labels, labels[held])


def test_as_many_neighbours_vote_at_the_temperature_that_was_asked_for(where):
    _, settings, model = where
    features, labels = by_hand(model, settings["data"], "class")
    features = torch.nn.functional.normalize(features.double(), dim=1)
    held, wanted = held_out(0), {}
    for neighbours, temperature in ((1, 0.07), (60, 0.0005), (60, 10.0)):
        right = []
        for feature, label in zip(features[held], labels[held], strict=True):
            cosine = (features[~held] @ feature).tolist()
            nearest = sorted(range(len(cosine)), key=lambda one: -cosine[one])[:neighbours]
            votes = [0.0] * 3
            for one in nearest:
                votes[labels[~held][one]] += math.exp((cosine[one] - 1) / temperature)
            right.append(votes.index(max(votes)) == label)
        wanted[neighbours, temperature] = 100 * sum(right) / len(right)
    assert len(set(wanted.values())) == 3  # each setting shows

    for (neighbours, temperature), value in wanted.items():
        (row,) = knn(KnnConfig(neighbours=neighbours, temperature=temperature, **settings))
        assert row.value == pytest.approx(value)


def test_the_probe_takes_maes_steps_at_the_rates_of_its_batch(where):
    _, settings, model = where
    with watching(nn.Sequential) as watched:
        (row,) = probe(ProbeConfig(epochs=3, warmup_epochs=1, probe_batch=24, base_lr=64.0, seed=2, **settings))
    features, labels = by_hand(model, settings["data"], "class")
    held = held_out(2)
    train, train_labels = features[~held].double(), labels[~held]

    assert len(watched.steps) == 12  # 96 features, four batches an epoch
    peak = 64.0 * 24 / 256
    falling = [peak * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    rates = [0, peak / 4, peak / 2, 3 * peak / 4, *falling]
    assert [groups[0]["lr"] for groups in watched.steps] == pytest.approx(rates)
    heads = [inputs[0] for inputs in watched.inputs[:12]]
    for first in range(0, 12, 4):  # each feature once an epoch
        epoch = torch.cat(heads[first : first + 4]).double()
        assert torch.cdist(epoch, train).argmin(dim=1).sort().values.tolist() == list(range(96))

    weight, bias = watched.initial["1.weight"].double(), watched.initial["1.bias"].double()
    drawn = torch.empty(3, 16).normal_(std=0.01, generator=torch.Generator().manual_seed(2))
    assert torch.equal(weight, drawn.double())
    assert not bias.any()
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    mean, variance = torch.zeros(16).double(), torch.ones(16).double()
    for batch, rate in zip(heads, rates, strict=True):
        batch, chosen = batch.double(), train_labels[torch.cdist(batch.double(), train).argmin(dim=1)]
        normed = (batch - batch.mean(dim=0)) / (batch.var(dim=0, correction=0) + 1e-6).sqrt()
        mean, variance = 0.9 * mean + 0.1 * batch.mean(dim=0), 0.9 * variance + 0.1 * batch.var(dim=0)
        missed = ((normed @ weight.T + bias).softmax(dim=1) - torch.eye(3)[chosen]) / len(batch)
        for place, (one, gradient) in enumerate(((weight, missed.T @ normed), (bias, missed.sum(dim=0)))):
            trust = 0.001 * one.norm() / gradient.norm() if place == 0 else 1.0
            velocity[place] = 0.9 * velocity[place] + trust * gradient
        weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    test = (features[held].double() - mean) / (variance + 1e-6).sqrt()
    right = (test @ weight.T + bias).argmax(dim=1) == labels[held]
    assert row.value == pytest.approx(100 * right.double().mean().item())
    head = watched.modules[-1]
    assert torch.allclose(head[1].weight.double(), weight, atol=1e-4)
    assert torch.allclose(head[1].bias.double(), bias, atol=1e-4)
