"""Weighted k-NN on frozen features: the protocol of DINO (arXiv:2104.14294, eval_knn.py)."""

from datetime import UTC, datetime

from jaxtyping import Float, Int64
from torch import Tensor

from encoders.knn import knn_votes
from evaluate.config import KnnConfig
from evaluate.features import train_and_test
from evaluate.result import Result, expect_results, rows_of, write_results
from training.device import pick_device

FEW_CLASSES = 10


def knn(config: KnnConfig) -> list[Result]:
    """Classify frozen features by their nearest neighbours.

    Raises:
        ValueError: The images have no classes, the encoder source is wrong, or `out` or `json` cannot be written.
        RowsNotKept: The rows were found, and could not be written after all.
    """
    expect_results(config)
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


def accuracies(scores: Float[Tensor, "test classes"], labels: Int64[Tensor, " test"]) -> dict[str, float]:
    """top1, and top5 from ten classes on, in percent; of equal scores the lower class id is guessed first."""
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    values = {"top1": 100 * (ranked[:, 0] == labels).double().mean().item()}
    if scores.shape[1] >= FEW_CLASSES:
        values["top5"] = 100 * (ranked[:, :5] == labels[:, None]).any(dim=1).double().mean().item()
    return values
