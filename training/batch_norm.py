"""Batch normalisation over the whole batch, wherever its images lie."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from training import distributed


class BatchNorm(nn.BatchNorm1d):
    """(x - mean) / √(var + ε) · weight + bias, in fp32, over the tokens of all ranks and without running means.

    By hand where there are several ranks, because PyTorch's SyncBatchNorm refuses CPUs. Each rank must bring equally
    many tokens.
    """

    def __init__(self, dim: int):
        super().__init__(dim, track_running_stats=False)

    def forward(self, input: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        x = input.float()
        if distributed.world_size() == 1:
            return super().forward(x)
        centred = x - mean_of_ranks(x.mean(dim=0))
        variance = mean_of_ranks(centred.square().mean(dim=0))
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


def mean_of_ranks(value: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The mean of `value` over ranks, through which gradients flow back to every rank."""
    return _MeanOfRanks.apply(value)


class _MeanOfRanks(torch.autograd.Function):
    """The ranks minimise the sum of their losses, so a value's gradient is the sum of what each rank's loss says of
    the mean, over the number of ranks: the mean again. (torch.distributed.nn.all_reduce is deprecated in 2.13.)"""

    @staticmethod
    def forward(ctx, value):
        return distributed.mean_over_ranks(value)

    @staticmethod
    def backward(ctx, *gradients):
        return distributed.mean_over_ranks(gradients[0])
