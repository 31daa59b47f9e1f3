"""The votes of nearest neighbours: the one place that counts them."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


def knn_votes(
    train: Float[Tensor, "train dim"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    *,
    classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
    chunk: int = 256,
    leave_one_out: bool = False,
) -> Float[Tensor, "test classes"]:
    """Votes of each test image's nearest training images for each class:

        votes[c] = Σ over the k neighbours of class c of exp((cosine - 1) / temperature)

    The - 1 changes no order and keeps a vote at 1 or less. Exact: every pair is compared, `chunk` test images
    at a time. k is at most the training set; of equally near images the one earlier in it is the neighbour.

    Args:
        leave_one_out: The test images are the training images, in their order, and none votes for itself.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k = min(neighbours, len(train) - leave_one_out)
    earlier_first = torch.arange(len(train) - 1, -1, -1, device=train.device)
    votes = torch.zeros(len(test), classes, dtype=torch.float64, device=test.device)
    for start in range(0, len(test), chunk):
        cosine = test[start : start + chunk] @ train.T
        if leave_one_out:
            cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        nearest = (_ordered_bits(cosine) << 32 | earlier_first).topk(k, dim=1).indices
        weight = ((cosine.gather(1, nearest).double() - 1) / temperature).exp()
        votes[start : start + chunk].scatter_add_(1, train_labels[nearest], weight)
    return votes


def _ordered_bits(values: Float[Tensor, "test train"]) -> Int64[Tensor, "test train"]:
    """fp32 numbers as integers of the same order: ties, which `topk` leaves open, are broken below them."""
    bits = (values.float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
