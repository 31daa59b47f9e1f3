"""k-NN and the linear probe on features: against slow twins, and on blobs that can be told apart."""

import math

import pytest
import torch
from reference.mae_lars import lars_steps
from torch import nn

from encoders.knn import knn_votes
from evaluate.config import KnnConfig, ProbeConfig
from evaluate.knn import accuracies
from evaluate.linear import batch_and_peak, lars, train_head


def slow_votes(train, labels, test, *, classes, neighbours, temperature):
    votes = torch.zeros(len(test), classes, dtype=torch.float64)
    for row, feature in enumerate(test):
        cosine = [torch.cosine_similarity(feature, other, dim=0).item() for other in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:neighbours]
        for i in nearest:
            votes[row, labels[i]] += math.exp((cosine[i] - 1) / temperature)
    return votes


def blobs(count: int, classes: int, seed: int):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = 3 * torch.eye(classes, 16)
    return centres[labels] + 0.5 * torch.randn(count, 16, generator=random), labels


@pytest.mark.parametrize("neighbours", [1, 5, 40, 1000])
def test_votes_are_those_of_a_slow_loop_whatever_the_chunk(neighbours):
    train, labels = blobs(40, 3, seed=0)
    test, _ = blobs(11, 3, seed=1)

    votes = knn_votes(train, labels, test, classes=3, neighbours=neighbours, temperature=0.5, chunk=4)

    slow = slow_votes(train, labels, test, classes=3, neighbours=neighbours, temperature=0.5)
    assert torch.allclose(votes, slow, rtol=1e-4, atol=1e-6)


def test_of_equally_near_images_the_earlier_one_votes():
    train = torch.tensor([[0.0, 1.0]] + [[1.0, 0.0]] * 9)
    labels = torch.tensor([0, 2, 1, 1, 1, 1, 1, 1, 1, 1])

    votes = knn_votes(train, labels, torch.tensor([[2.0, 0.0], [0.0, -1.0]]), classes=3, neighbours=1)

    assert votes[0].tolist() == [0, 0, 1]
    assert votes[1].argmax() == 2  # cosines -1 and nine zeros


def test_accuracy_is_in_percent_and_top5_needs_ten_classes():
    labels = torch.tensor([0, 1, 2, 3])
    few, many = torch.eye(4)[[0, 1, 2, 0]], torch.zeros(4, 10)

    assert accuracies(few, labels) == {"top1": 75}
    assert accuracies(many, labels) == {"top1": 25, "top5": 100}


def test_knn_and_the_probe_tell_blobs_apart():
    train, labels = blobs(300, 4, seed=0)
    test, test_labels = blobs(100, 4, seed=1)
    batch, peak = batch_and_peak(len(train), None, 0.1)

    votes = knn_votes(train, labels, test, classes=4)
    head = train_head(train, labels, classes=4, epochs=90, warmup_epochs=10, batch=batch, peak=peak, seed=0)

    assert accuracies(votes, test_labels)["top1"] > 97
    assert accuracies(head(test).detach(), test_labels)["top1"] > 97


def test_the_probe_is_a_function_of_its_seed():
    train, labels = blobs(60, 3, seed=0)

    def weight(seed):
        settings = {"classes": 3, "epochs": 3, "warmup_epochs": 1, "batch": 16, "peak": 1.0}
        return train_head(train, labels, seed=seed, **settings)[1].weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


def test_lars_steps_are_maes():
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    start = [parameter.detach().clone() for parameter in (linear.weight, linear.bias)]
    gradients = [[torch.randn_like(part) for part in start] for _ in range(20)]
    optimizer = lars(linear, lr=0.7)

    for of_weight, of_bias in gradients:
        linear.weight.grad, linear.bias.grad = of_weight.clone(), of_bias.clone()
        optimizer.step()

    for number, parameter in enumerate((linear.weight, linear.bias)):
        wanted = lars_steps(start[number], [pair[number] for pair in gradients], lr=0.7)
        assert torch.allclose(parameter, wanted, rtol=1e-6, atol=1e-7)


def test_the_learning_rate_scales_with_the_batch():
    assert batch_and_peak(1_281_167, None, 0.1) == (16384, pytest.approx(6.4))
    assert batch_and_peak(1_281_167, 512, 0.1) == (512, pytest.approx(0.2))
    assert batch_and_peak(1000, None, 0.1) == (256, pytest.approx(6.4))
    with pytest.raises(ValueError, match="at least 2 training images"):
        batch_and_peak(1, None, 0.1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data": "d"}, "either --checkpoint or --encoder, got neither"),
        ({"data": "d", "images": "i", "encoder": "e"}, "either --data or --images, got both"),
        ({"images": "i", "encoder": "e", "tokens": "kept"}, "--tokens kept needs the foreground rank"),
        ({"data": "d", "encoder": "e", "keep_share": 0.5}, "choose the patches of --tokens kept; add it"),
        ({"data": "d", "encoder": "e", "labels": "l"}, "choose the patches of --tokens kept; add it"),
        ({"data": "d", "encoder": "e", "tokens": "kept", "keep_share": 0.0}, r"keep_share must lie in \(0, 1\], got 0"),
        ({"data": "d", "encoder": "e", "tokens": "kept", "val_labels": "l"}, "laid over --val-data, which is missing"),
        (
            {"data": "d", "val_data": "v", "encoder": "e", "tokens": "kept", "labels": "l"},
            "both splits are kept by one",
        ),
        ({"data": "d", "val_data": "a", "val_images": "b", "encoder": "e"}, "got both"),
        ({"data": "d", "encoder": "e", "batch_size": 0}, "batch_size and threads must be at least 1"),
    ],
)
@pytest.mark.parametrize("kind", [KnnConfig, ProbeConfig])
def test_a_wrong_config_is_refused(kind, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**settings)
