"""Files of ViT weights, whoever wrote them, as one flat state dict in timm's names.

`weight_files.py` reads, `branches.py` chooses, `timm_names.py` renames; here they come together, and the result is
loaded strictly.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.architecture import ViT
from encoders.branches import Branch, branches, preference, same, tensor_names
from encoders.shape import Shape, shape_of
from encoders.timm_names import in_timm_names
from encoders.weight_files import read_content
from training.checkpoint import CheckpointError, find, load_tensors


@dataclass(frozen=True, slots=True)
class Weights:
    """The backbone that was chosen in a file."""

    tensors: dict[str, Tensor]
    """In timm's names, fp32, without heads."""
    whole: dict[str, Tensor]
    """What is stored where it was taken from, in the file's names: it, and heads or a decoder beside it."""
    place: str
    """Where it was: `state_dict_ema`, `teacher.backbone`; empty for the file itself."""
    others: tuple[str, ...]
    """Where there were ViTs that were not taken."""
    layout: str
    """Whose code writes such files; empty where many do."""
    heads: int | None
    """Number of attention heads, where the file gives another than its architecture has."""
    header: dict[str, Any]
    """Of a safetensors file."""
    args: Any
    """The settings of the training, where the file holds them."""

    @property
    def under(self) -> str:
        return f", under {self.place}," if self.place else ""


def read_weights(path: Path, *, wanted: Shape | None = None, official: bool = False) -> Weights:
    """The backbone in the file at `path`: of several the preferred one (`branches`) among those that fit.

    Args:
        wanted: The architecture that they are for.
        official: It should be a file that DINO or iBOT hand out, for their normalisation.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It cannot be read as weights, holds no ViT or two of equal rank, or is not official.
    """
    content, header = read_content(path)
    return _backbone(content, header, path, wanted, official)


def _backbone(
    content: Any, header: dict[str, Any], path: Path, wanted: Shape | None = None, official: bool = False
) -> Weights:
    found = branches(content)
    if not found:
        names = tensor_names(content)
        told = f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"
        raise CheckpointError(
            f"{path} holds no ViT: expected tensors, one of them a patch_embed.proj.weight, found {told}; "
            "check the file"
        )
    vits = [(branch, in_timm_names(branch.tensors)) for branch in found]
    chosen, tensors = _chosen([one for one in vits if wanted is None or shape_of(one[1]) == wanted] or vits, path)
    if official and "head.weight" in chosen.tensors:
        raise CheckpointError(
            f"{path} holds the head.weight of a classifier and is no official DINO or iBOT file; it may need another "
            "normalisation than theirs, so pass it as timm:NAME=FILE"
        )
    saved = content if isinstance(content, dict) else {}
    layout = layout_of(chosen, found, trained="args" in saved)
    return Weights(
        tensors,
        chosen.tensors,
        chosen.name,
        tuple(branch.name or "the file itself" for branch in found if branch is not chosen),
        layout,
        _heads(layout, shape_of(tensors), saved.get("arch")),
        header,
        saved.get("args"),
    )


def _chosen(vits: list[tuple[Branch, dict[str, Tensor]]], path: Path) -> tuple[Branch, dict[str, Tensor]]:
    first = vits[0][0]
    for rival, _ in vits[1:]:
        if preference(rival) == preference(first) and not same(rival, first):
            raise CheckpointError(
                f"{path} holds a ViT under {first.name or 'its top'} and another under {rival.name or 'its top'}, and "
                "does not say which is better; save the state dict of one alone"
            )
    return vits[0]


def layout_of(chosen: Branch, found: list[Branch], *, trained: bool) -> str:
    """Whose training wrote this, as far as Meta's codes, which all normalise by ImageNet's statistics, differ from
    other people's; empty where nothing tells: `model` is everybody's key, so more must be there:
    the training's arguments (`trained`), no classifier, or a fine-tuned MAE's norm."""
    segments, names = {part for branch in found for part in branch.place}, chosen.tensors
    if segments & {"base_encoder", "momentum_encoder"}:
        return "MoCo v3"
    if any(name.startswith("decoder_") for name in names):
        return "MAE"
    if "register_tokens" in names or ("mask_token" in names and "blocks.0.ls1.gamma" in names):
        return "DINOv2"
    if segments & {"teacher", "student"} and "backbone" in segments:
        return "DINO, iBOT and DINOv2"
    of_mae = trained or "head.weight" not in names or "fc_norm.weight" in names
    return "MAE and DeiT" if chosen.place == ("model_ema",) or (chosen.place == ("model",) and of_mae) else ""


def _heads(layout: str, shape: Shape | None, arch: Any) -> int | None:
    """MoCo v3's vit_small has 12 heads of 32, and the weights do not show it (arXiv:2104.02057, its vits.py)."""
    return 12 if layout == "MoCo v3" and arch == "vit_small" and shape and shape.dim == 384 else None


def read_run(path: Path) -> Weights:
    """Backbone of one of our runs (`encoder` or `pretrain`), or of one checkpoint file; the header describes the ViT
    under `vit`."""
    file = find(path)
    tensors, metadata = load_tensors(file)
    tensors = {name: value for name, value in tensors.items() if not name.startswith("masking.")}  # may be a ViT too
    if "vit" not in metadata:
        raise CheckpointError(
            f"{file} does not describe a ViT; expected a run of `semmae encoder` or `semmae pretrain`"
        )
    return replace(_backbone(tensors, metadata, file), whole=tensors)


def resize_positions(positions: Tensor, *, prefix: int, grid: int) -> Tensor:
    """Learned positions (1, prefix + g², dim) resampled to another grid; prefix tokens stay untouched.

    Plain bicubic in fp32, antialiasing off, `size=` given: MAE's way, and the one that matches DINOv2's own.
    """
    kept, cells = positions[:, :prefix], positions[:, prefix:]
    side = math.isqrt(cells.shape[1])
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
        patches_stored = weights["pos_embed"].shape[1] - prefix
        stored = math.isqrt(max(0, patches_stored))
        if stored * stored != patches_stored:
            raise CheckpointError(
                f"{source} has positions of {patches_stored} patches, which form no square grid; expected a ViT of "
                "square images"
            )
        weights["pos_embed"] = resize_positions(weights["pos_embed"], prefix=prefix, grid=grid)
        resized = f"{stored}x{stored} to {grid}x{grid}, bicubic, no antialias"
        notes.append("as stored" if stored == grid else resized)
    if getattr(model, "rope", None) is not None:
        notes.append(f"rotary, computed for {grid}x{grid}")
    expected = model.state_dict()
    weights = {_layer_scale_of(expected, name): value for name, value in weights.items()}
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


def _layer_scale_of(expected: dict[str, Tensor], name: str) -> str:
    """DeiT III's name of a LayerScale in the model's, which is another in plain ViTs."""
    ours = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
    return ours if name not in expected and ours in expected else name


def refuse_other_shape(weights: Weights, wanted: Shape | None, file: Path, architecture: str) -> None:
    """Raise a CheckpointError that shows both, where the file holds another ViT than the architecture is."""
    found = shape_of(weights.tensors)
    if found == wanted:
        return
    if found is None:
        stem = weights.tensors.keys() & {"patch_embed.proj.0.weight"}
        told = "a stem of convolutions before its blocks" if stem else "a patch embedding that is no convolution"
        raise CheckpointError(f"{file} holds{weights.under} a ViT with {told}, which cannot be read")
    raise CheckpointError(
        f"{file} holds{weights.under} a ViT of another shape than {architecture}: found {found}; expected {wanted}; "
        "name the architecture that it is of"
    )


def numbers_of(weights: dict[str, Tensor], name: str) -> dict[str, int]:
    """A ViT's numbers read off official DINO or iBOT weights, whose heads are always 64 wide."""
    shape = shape_of(weights)
    if shape is None or "cls_token" not in weights:
        lacking = "cls_token" if shape else "patch_embed.proj.weight"
        raise CheckpointError(f"{name} is no ViT checkpoint of DINO or iBOT: {lacking} is not in it")
    if shape.traits:
        raise CheckpointError(
            f"{name} holds a ViT of {shape}, and those of DINO and iBOT are plain; pass it as timm:NAME=FILE"
        )
    if shape.dim % 64:
        raise CheckpointError(
            f"{name} is {shape.dim} wide; DINO and iBOT have heads of 64, so expected a multiple of it"
        )
    return {
        "patch_size": shape.patch,
        "embed_dim": shape.dim,
        "depth": shape.depth,
        "num_heads": shape.dim // 64,
    }


def patch_of(weights: dict[str, Tensor]) -> int:
    """Pixels a side of a patch."""
    return weights["patch_embed.proj.weight"].shape[-1]


def fingerprint(weights: dict[str, Tensor]) -> str:
    """SHA-256 over the names and fp32 bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
