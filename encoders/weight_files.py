"""What a file of weights holds, read without running any code in it."""

import argparse
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from training.checkpoint import CheckpointError, load_tensors

NUMBERS = "?bhilqBHILQefdgFDGSU"
"""Numpy's codes of plain values; objects are not among them."""


def read_content(path: Path) -> tuple[Any, dict[str, Any]]:
    """What was saved to `path`, and the header of a safetensors file.

    Besides tensors and plain values, numpy's numbers and arrays, paths and `argparse.Namespace` are read: training
    scripts keep their settings and random states in those.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It cannot be read as weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: expected a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    with torch.serialization.safe_globals(_harmless()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True), {}
        except OSError:
            raise
        except Exception as error:  # PyTorch's readers raise many kinds, and advise to run whatever code is in the file
            unknown = _unknown_classes(path)
            told = f", and this one holds {', '.join(unknown[:3])}, which only code can rebuild" if unknown else ""
            raise CheckpointError(
                f"{path} is no weights file: expected .safetensors or a PyTorch checkpoint of tensors and plain values"
                f"{told}; check the file, or save its state dict alone"
            ) from error


def _harmless() -> list[Any]:
    """Classes and functions that a file may name: their results are values, and building them runs nothing else."""
    array = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        *{type(np.dtype(code)) for code in NUMBERS},
        *(
            (one, f"numpy.{core}.multiarray.{name}")
            for core in ("core", "_core")
            for one, name in ((array, "_reconstruct"), (scalar, "scalar"))
        ),
        *(
            (pure, f"{module}.{name}")
            for module in ("pathlib", "pathlib._local")  # Python 3.13 moved them
            for pure, name in (
                (PurePosixPath, "PosixPath"),
                (PureWindowsPath, "WindowsPath"),
                (PurePosixPath, "PurePosixPath"),
                (PureWindowsPath, "PureWindowsPath"),
            )
        ),
    ]


def _unknown_classes(path: Path) -> list[str]:
    """What else the file names, where PyTorch can tell."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not in PyTorch's zip format, or no file of its at all
        return []
