"""Ranks: one process works without any of this, torchrun and Ray Train with it."""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def join(device_name: str) -> bool:
    """Join the process group that torchrun describes in the environment, unless Ray Train joined it already.

    Takes gloo without CUDA, nccl with it, and binds this process to the GPU of its local rank. Returns whether a
    group was joined here, which is then `leave`'s to leave.
    """
    on_cuda = device_name in ("auto", "cuda") and torch.cuda.is_available()
    if on_cuda and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    dist.init_process_group("nccl" if on_cuda else "gloo")
    return True


def leave() -> None:
    """Leave the process group."""
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def average_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Gradients become their mean over ranks, in one reduction.

    For small models, and for steps of several forward passes, where DistributedDataParallel's reductions inside the
    backward pass would meet others.
    """
    if world_size() == 1:
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    averaged = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, averaged.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Every rank takes the main one's values, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of `value` over ranks; `value` itself when there is one."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def on_any_rank(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set on any rank: what all ranks must do together."""
    if world_size() == 1:
        return flags
    told = torch.tensor(flags, dtype=torch.int32, device=_of_the_group())
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in told.tolist())


def agree(number: int) -> bool:
    """Whether the number is the same on every rank."""
    if world_size() == 1:
        return True
    main = torch.tensor(number, device=_of_the_group())
    broadcast([main])
    return not on_any_rank(int(main) != number)[0]


def gathered(value: Any) -> list[Any]:
    """What each rank has, in their order; on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def _of_the_group() -> str:
    """The kind of device whose tensors the group sends."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
