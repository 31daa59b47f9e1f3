"""Linear probe on frozen features: the protocol of MAE (arXiv:2111.06377, appendix A.1, main_linprobe.py).

A departure makes it fast: features are those of one centre crop, computed once, where MAE draws a fresh crop
and flip every epoch. Expect a little less than MAE's numbers; compare rows of this probe only with each other.
"""

from datetime import UTC, datetime

import torch
from jaxtyping import Float, Int64
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from evaluate.config import ProbeConfig
from evaluate.features import train_and_test
from evaluate.knn import accuracies
from evaluate.result import Result, expect_results, rows_of, write_results
from training.device import pick_device
from training.schedule import learning_rate

PAPER_BATCH = 16384
SMALL_SET, SMALL_BATCH = 10_000, 256


def probe(config: ProbeConfig) -> list[Result]:
    """Train a linear classifier on frozen features.

    Raises:
        ValueError: The images have no classes, the encoder source is wrong, or `out` or `json` cannot be written.
        RowsNotKept: The rows were found, and could not be written after all.
    """
    expect_results(config)
    found = train_and_test(config)
    device = pick_device(config.device)
    batch, peak = batch_and_peak(len(found.train), config.probe_batch, config.base_lr)
    head = train_head(
        found.train.to(device),
        found.train_labels.to(device),
        classes=found.classes,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        batch=batch,
        peak=peak,
        seed=config.seed,
    )
    with torch.no_grad():
        scores = torch.cat([head(part).cpu() for part in found.test.to(device).split(4096)])
    values = accuracies(scores, found.test_labels)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = rows_of(config, found, values, protocol="probe", epochs=config.epochs, time=now)
    write_results(config, rows)
    return rows


def batch_and_peak(count: int, asked: int | None, base_lr: float) -> tuple[int, float]:
    """Features a step, and the peak learning rate base_lr · batch / 256.

    Unless `asked`, the batch is MAE's 16,384. Below 10,000 features that is one step an epoch, and a smaller
    batch under the linear rule leaves the weights nearly where they began: LARS moves them by lr/1000 of their
    norm a step, so the way is proportional to the number of features. There, steps of 256 keep the rate of
    16,384 (10 classes, 400 features of a ViT-Tiny: 66 % right, against 13 % under the linear rule).

    Raises:
        ValueError: There are fewer than two features, too few for batch statistics.
    """
    if count < 2:
        raise ValueError(f"a linear probe needs at least 2 training images, got {count}; add images")
    if asked is not None:
        return min(asked, count), base_lr * asked / 256
    return (min(SMALL_BATCH, count) if count < SMALL_SET else PAPER_BATCH), base_lr * PAPER_BATCH / 256


def train_head(
    features: Float[Tensor, "train dim"],
    labels: Int64[Tensor, " train"],
    *,
    classes: int,
    epochs: int,
    warmup_epochs: float,
    batch: int,
    peak: float,
    seed: int,
) -> nn.Sequential:
    """BatchNorm without affine, then a linear layer, trained by cross-entropy; returned in eval mode.

    An epoch drops its last, smaller batch, as MAE does, unless it is the only one.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(features.shape[1], classes)
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    head = nn.Sequential(nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6), linear).to(features.device)
    optimizer = lars(linear, lr=peak)
    steps_per_epoch = max(1, len(features) // batch)
    total, step = epochs * steps_per_epoch, 0
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for chosen in order.split(batch)[:steps_per_epoch]:
            rate = learning_rate(
                step, peak=peak, warmup_steps=round(warmup_epochs * steps_per_epoch), total_steps=total
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(head(features[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return head.eval()


def lars(linear: nn.Linear, *, lr: float) -> Lars:
    """MAE's LARS (util/lars.py; arXiv:1708.03888) in timm's terms: momentum, trust ratio on the weight only.

    Without `always_adapt` timm skips the trust ratio where there is no decay, and is silently SGD.
    """
    groups = [{"params": [linear.weight], "always_adapt": True}, {"params": [linear.bias]}]
    return Lars(groups, lr=lr, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)
