"""Ranks: one process works without any of this, torchrun and Ray Train with it."""

import os

import torch
import torch.distributed as dist


def start(device_name: str) -> bool:
    """Join the process group that torchrun describes in the environment, unless Ray Train joined it already.

    Takes gloo without CUDA, nccl with it, and binds this process to the GPU of its local rank. Returns whether a
    group was joined here, which is then `stop`'s to leave.
    """
    on_cuda = device_name in ("auto", "cuda") and torch.cuda.is_available()
    if on_cuda and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    dist.init_process_group("nccl" if on_cuda else "gloo")
    return True


def stop() -> None:
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


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of `value` over ranks; `value` itself when there is one."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()
