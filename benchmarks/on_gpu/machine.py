"""Which machine the figures are of."""

import os
import shutil
import subprocess
from typing import Any

import timm
import torch

from training.run_folder import package_versions

NOMINAL = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""Dense bf16 FLOP/s on the data sheet, by the name that the card gives itself."""


def describe(device: str) -> dict[str, Any]:
    """Card, memory, driver and versions. Touches the GPU: call it in a process of its own."""
    versions = package_versions() | {"cuda": torch.version.cuda, "timm": timm.__version__}
    told: dict[str, Any] = {"cores": os.cpu_count(), "versions": versions, "card": None}
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        told |= {"card": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1), "driver": _driver()}
    return told


def nominal_flops(device: str) -> float:
    """The data sheet's bf16 rate, or 0 where it is not known."""
    return NOMINAL.get(torch.cuda.get_device_name(0), 0.0) if device == "cuda" else 0.0


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None
