"""A model on several ranks: one process, or DistributedDataParallel."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training import distributed


def on_ranks(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, wrapped where there are several ranks: a backward pass then leaves the mean of their gradients."""
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def gradients_stay_here(model: nn.Module, *, where: bool) -> AbstractContextManager:
    """Inside, where asked for, a backward pass adds to this rank's gradients alone: another micro-batch follows."""
    return model.no_sync() if where and isinstance(model, DistributedDataParallel) else nullcontext()
