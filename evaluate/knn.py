"""Weighted k-NN on frozen features: the protocol of DINO (arXiv:2104.14294, eval_knn.py)."""

from datetime import UTC, datetime

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from evaluate.config import KnnConfig
from evaluate.features import train_and_test
from evaluate.result import Result, rows_of, write_results
from training.device import pick_device

FEW_CLASSES = 10


def knn(config: KnnConfig) -> list[Result]:
    """Classify frozen features by their nearest neighbours.

    Raises:
        ValueError: The images have no classes, or the encoder source is wrong.
    """
    found = train_and_test(config)
    device = pick_device("cpu" if config.device == "mps" else config.device)
    votes = knn_votes(
        found.train.to(device),
        found.train_labels.to(device),
        found.test.to(device),
        classes=found.classes,
        neighbours=config.neighbours,
        temperature=config.temperature,
    )
    values = accuracies(votes.cpu(), found.test_labels)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = rows_of(config, found, values, protocol="knn", epochs=0, time=now)
    write_results(config, rows)
    return rows


def knn_votes(
    train: Float[Tensor, "train dim"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    *,
    classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
    chunk: int = 256,
) -> Float[Tensor, "test classes"]:
    """Votes of each test image's nearest training images for each class:

        votes[c] = Σ over the k neighbours of class c of exp((cosine - 1) / temperature)

    The - 1 changes no order and keeps a vote at 1 or less. Exact: every pair is compared, `chunk` test images
    at a time. k is at most the training set; of equally near images the one earlier in it is the neighbour.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k = min(neighbours, len(train))
    earlier_first = torch.arange(len(train) - 1, -1, -1, device=train.device)
    votes = torch.zeros(len(test), classes, dtype=torch.float64, device=test.device)
    for start in range(0, len(test), chunk):
        cosine = test[start : start + chunk] @ train.T
        nearest = (_ordered_bits(cosine) << 32 | earlier_first).topk(k, dim=1).indices
        weight = ((cosine.gather(1, nearest).double() - 1) / temperature).exp()
        votes[start : start + chunk].scatter_add_(1, train_labels[nearest], weight)
    return votes


def accuracies(scores: Float[Tensor, "test classes"], labels: Int64[Tensor, " test"]) -> dict[str, float]:
    """top1, and top5 from ten classes on, in percent; of equal scores the lower class id is guessed first."""
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    values = {"top1": 100 * (ranked[:, 0] == labels).double().mean().item()}
    if scores.shape[1] >= FEW_CLASSES:
        values["top5"] = 100 * (ranked[:, :5] == labels[:, None]).any(dim=1).double().mean().item()
    return values


def _ordered_bits(values: Float[Tensor, "test train"]) -> Int64[Tensor, "test train"]:
    """fp32 numbers as integers of the same order: ties, which `topk` leaves open, are broken below them."""
    bits = (values.float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
