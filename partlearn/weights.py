"""Files of ViT weights, whoever wrote them, as one flat state dict in timm's names.

Accepts timm files (.safetensors, .pth), official DINO and iBOT files (teacher only, or a whole training checkpoint
with student, teacher and DDP's prefixes; arXiv:2104.14294, arXiv:2111.07832), MAE's `{"model": ...}`, and our runs.
"""

import argparse
import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.checkpoint import CheckpointError, find, load_tensors

WRAPPERS = (
    "teacher",
    "state_dict",
    "model",
    "student",
)  # in this order: a teacher is better than its student
PREFIXES = ("module.", "backbone.", "encoder.")
NOT_THE_BACKBONE = ("head.", "fc_norm.", "masked_embed", "mask_token", "decoder", "scorer_pred.")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The backbone in the file at `path`, and what the file says about it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read as weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: expected a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        tensors, metadata = load_tensors(path)
        return backbone(tensors, path), metadata
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as PyTorch weights: {reason}") from None
    return backbone(content, path), {}


def backbone(content: Any, path: Path) -> dict[str, Tensor]:
    """Unwrap a checkpoint, strip its prefixes (only where they lead), and drop what is not the backbone."""
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict, nor one under {', '.join(WRAPPERS)}")
    flat = {}
    for name, value in content.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if isinstance(value, Tensor) and not name.startswith(NOT_THE_BACKBONE):
            flat[name] = value.float()
    return flat


def read_run(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Backbone and ViT description of one of our runs (`encoder` or `pretrain`), or of one checkpoint file."""
    file = find(path)
    tensors, metadata = load_tensors(file)
    if "vit" not in metadata:
        raise CheckpointError(
            f"{file} does not describe a ViT; expected a run of `semmae encoder` or `semmae pretrain`"
        )
    return backbone(tensors, file), metadata["vit"]


def resize_positions(positions: Tensor, *, prefix: int, grid: int) -> Tensor:
    """Learned positions (1, prefix + g², dim) resampled to another grid; prefix tokens stay untouched.

    Plain bicubic in fp32, antialiasing off, `size=` given: MAE's way, and the one that matches DINOv2's own.
    """
    kept, cells = positions[:, :prefix], positions[:, prefix:]
    side = int(cells.shape[1] ** 0.5)
    if side * side != cells.shape[1]:
        raise CheckpointError(f"positions of {cells.shape[1]} patches form no square grid")
    if side == grid:
        return positions
    square = cells.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=False, align_corners=False)
    return torch.cat([kept.float(), resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def fingerprint(weights: dict[str, Tensor]) -> str:
    """SHA-256 over the names and fp32 bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
