"""Files of ViT weights, whoever wrote them, as one flat state dict in timm's names.

Accepts timm files (.safetensors, .pth), official DINO and iBOT files (teacher only, or a whole training checkpoint
with student, teacher and DDP's prefixes; arXiv:2104.14294, arXiv:2111.07832), MAE's `{"model": ...}`, and our runs.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.architecture import ViT
from training.checkpoint import CheckpointError, find, load_tensors

WRAPPERS = ("teacher", "state_dict", "model", "student")  # in this order: a teacher is better than its student
PREFIXES = ("module.", "backbone.", "encoder.")
NOT_THE_BACKBONE = ("head.", "fc_norm.", "masked_embed", "mask_token", "decoder", "scorer_pred.")


def read_weights(path: Path, *, official: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The backbone in the file at `path`, and what the file says about it.

    Args:
        official: It should be a file that DINO or iBOT hand out, for their normalisation.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read as weights, or is not official.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: expected a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        tensors, metadata = load_tensors(path)
        return backbone(tensors, path, official), metadata
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # PyTorch's readers raise many kinds, and advise to run whatever code is in the file
        raise CheckpointError(
            f"{path} is no weights file: expected .safetensors or a PyTorch checkpoint of tensors and plain values; "
            "check the file, or save its state dict alone"
        ) from error
    return backbone(content, path, official), {}


def backbone(content: Any, path: Path, official: bool = False) -> dict[str, Tensor]:
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
        if isinstance(value, Tensor):
            flat[name] = value.float()
    if official and "head.weight" in flat:
        raise CheckpointError(
            f"{path} holds the head.weight of a classifier and is no official DINO or iBOT file; it may need another "
            "normalisation than theirs, so pass it as timm:NAME=FILE"
        )
    return {name: value for name, value in flat.items() if not name.startswith(NOT_THE_BACKBONE)}


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


def load_strictly(model: ViT, weights: dict[str, Tensor], source: str) -> str:
    """Load every tensor; returns what became of the positions.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape.
    """
    patches: Any = model.patch_embed
    weights, grid, notes = dict(weights), patches.grid_size[0], []
    if "pos_embed" in weights and model.pos_embed is not None:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        stored = int((weights["pos_embed"].shape[1] - prefix) ** 0.5)
        weights["pos_embed"] = resize_positions(weights["pos_embed"], prefix=prefix, grid=grid)
        resized = f"{stored}x{stored} to {grid}x{grid}, bicubic, no antialias"
        notes.append("as stored" if stored == grid else resized)
    if getattr(model, "rope", None) is not None:
        notes.append(f"rotary, computed for {grid}x{grid}")
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong = [n for n in sorted(expected.keys() & weights.keys()) if expected[n].shape != weights[n].shape]
    if missing or extra or wrong:
        found = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", extra), ("of another shape", wrong))
            if names
        )
        raise CheckpointError(
            f"the weights of {source} do not fit its architecture: {found}; check the file and the name"
        )
    model.load_state_dict(weights)
    return "; ".join(notes) or "none"


def numbers_of(weights: dict[str, Tensor], name: str) -> dict[str, int]:
    """A ViT's numbers read off official DINO or iBOT weights, whose heads are always 64 wide."""
    try:
        dim, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    except KeyError as error:
        raise CheckpointError(f"{name} is no ViT checkpoint of DINO or iBOT: {error.args[0]} is not in it") from None
    if dim % 64:
        raise CheckpointError(f"{name} is {dim} wide; DINO and iBOT have heads of 64, so expected a multiple of it")
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    return {"patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": dim // 64}


def patch_of(weights: dict[str, Tensor], source: str) -> int:
    """Pixels a side of a patch."""
    if "patch_embed.proj.weight" not in weights:
        raise CheckpointError(f"{source} holds no ViT: patch_embed.proj.weight is not in it")
    return weights["patch_embed.proj.weight"].shape[-1]


def fingerprint(weights: dict[str, Tensor]) -> str:
    """SHA-256 over the names and fp32 bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
