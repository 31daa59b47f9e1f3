"""Which device, and in which precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def devices_here() -> list[str]:
    """What this machine offers, the fastest first."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in available.items() if there]


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes cuda, then mps, then cpu. ValueError when the machine lacks it."""
    here = devices_here()
    if name == "auto":
        name = here[0]
    if name not in here:
        raise ValueError(f"--device {name} was asked for, but this machine offers {', '.join(here)}; use --device auto")
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is native there: CUDA from Ampere on, CPUs with AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def precision_on(device: torch.device, precision: str) -> str:
    """fp32 or bf16; `auto` is bf16 where the device computes it."""
    if precision != "auto":
        return precision
    return "bf16" if computes_bf16(device) else "fp32"


def computed_here(device: str, precision: str) -> dict[str, str]:
    """What device and precision, either of which may be `auto`, are in this process. See `pick_device`."""
    picked = pick_device(device)
    return {"device": picked.type, "precision": precision_on(picked, precision)}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bf16 autocast when asked for, or for `auto` where the device computes it; otherwise nothing."""
    if precision_on(device, precision) == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def plain_attention_on_cpu(model: nn.Module, device: torch.device) -> None:
    """On a CPU, let timm's blocks multiply attention out: the backward pass of PyTorch's fused attention takes four
    times as long there at our sizes (2.13, bf16, 37 and 145 tokens: 1.33 s against 0.35 s for a step of 64)."""
    if device.type == "cpu":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010 (no attribute of nn.Module)
