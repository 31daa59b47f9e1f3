"""`--init`: a pretraining that begins with weights which are there.

The encoder comes from any source that `encoders.load` knows. A decoder is taken from a run of ours or from a file of
MAE's code (arXiv:2111.06377: mae_visualize_vit_*.pth, checkpoints of a pretraining), where it has the model's size.
"""

from typing import Any

import torch
from torch import Tensor

from encoders.load import Found, weights_of
from encoders.normalisation import Normalisation
from encoders.shape import shape_of
from encoders.weights import load_strictly
from pretrain.mae import MAE
from training.augment import IMAGENET_MEAN, IMAGENET_STD
from training.checkpoint import CheckpointError

OF_MAE = 32
"""Width of a head in every decoder of MAE's code; its weights do not show it."""


@torch.no_grad()
def initialise(model: MAE, source: str) -> str:
    """Load the encoder that `source` names, and the decoder beside it where that one fits; returns what was done.

    Positions are taken as they are, resampled where the grid is another, and stay fixed as MAE's do: what a run trains
    does not depend on how it began. Where the weights want pixels normalised otherwise than by ImageNet's statistics,
    the patch embedding takes that over, exactly.

    Raises:
        ValueError: `source` names no encoder, or its ViT has other numbers than the model.
        FileNotFoundError: The file or run is not there.
        CheckpointError: The weights are of no plain ViT, or cannot be read.
    """
    found = weights_of(source)
    _refuse_another_encoder(model, found, source)
    positions = load_strictly(model.encoder, found.weights, f"--init {source}")
    _take_over(model.encoder.patch_embed.proj, found.normalisation)
    decoder, why = _decoder_of(model, found)
    model.load_state_dict(decoder, strict=False)
    told = "taken" if decoder else f"drawn from the seed ({why})"
    return f"--init {source}: encoder taken, its positions {positions}; decoder {told}"


def _refuse_another_encoder(model: MAE, found: Found, source: str) -> None:
    ours, theirs = shape_of(model.encoder.state_dict()), shape_of(found.weights)
    if theirs is None or theirs.traits:
        raise CheckpointError(f"--init {source} is a ViT of {theirs or 'another kind'}; expected a plain one")
    with torch.device("meta"):
        heads = found.build(found.native).blocks[0].attn.num_heads
    if (theirs, heads) != (ours, here := _heads(model.encoder.blocks)):
        raise ValueError(
            f"--init {source} has {theirs} and {heads} heads, and the model {ours} and {here} heads; add --patch "
            f"{theirs.patch} --embed-dim {theirs.dim} --depth {theirs.depth} --heads {heads}, or choose another source"
        )


def _take_over(projection: Any, theirs: Normalisation) -> None:
    """Let a patch embedding for pixels normalised as `theirs` read ImageNet's:

    (x - m) / s = (S / s) · (x - M) / S + (M - m) / s,      m, s theirs,   M, S ImageNet's
    """
    if (theirs.mean, theirs.std) == (IMAGENET_MEAN, IMAGENET_STD):
        return
    m, s, mean, std = (
        torch.tensor(one).reshape(3, 1, 1) for one in (theirs.mean, theirs.std, IMAGENET_MEAN, IMAGENET_STD)
    )
    projection.bias += (projection.weight * ((mean - m) / s)).sum(dim=(1, 2, 3))
    projection.weight *= std / s


def _decoder_of(model: MAE, found: Found) -> tuple[dict[str, Tensor], str]:
    """A decoder in our names; or an empty dict, and why."""
    whole: dict[str, Tensor] = {} if found.file is None else found.file.whole
    if "decoder_embed.weight" not in whole:
        return {}, "the source has no decoder"
    theirs, patches = _in_our_names(whole, model.patch), found.weights["pos_embed"].shape[1] - 1
    dim = len(whole["decoder_embed.weight"])
    told = found.file.header.get("mae", {}) if found.file else {}
    depth = len({name.split(".")[1] for name in theirs if name.startswith("decoder_blocks.")})
    size = _size(dim, depth, told.get("decoder_heads", dim // OF_MAE), patches)
    blocks = model.decoder_blocks
    ours = _size(model.decoder_norm.weight.shape[0], len(blocks), _heads(blocks), model.rows * model.cols)
    if size != ours:
        return {}, f"there it is {size}, here {ours}"
    table = whole.get("decoder_pos_embed", model.decoder_positions)
    if not torch.allclose(table.float(), model.decoder_positions, atol=1e-4):
        return {}, "there it has other positions than MAE's"
    wanted = {name: value.shape for name, value in model.state_dict().items() if not name.startswith("encoder.")}
    decoder = {name: value.float() for name, value in theirs.items() if wanted.get(name) == value.shape}
    if missing := sorted(wanted.keys() - decoder.keys()):
        return {}, f"there it has no {missing[0]} of {tuple(wanted[missing[0]])}"
    return decoder, ""


def _size(dim: int, depth: int, heads: int, patches: int) -> str:
    return f"{depth} blocks of width {dim} with {heads} heads on {patches} patches"


def _heads(blocks: Any) -> int:
    return blocks[0].attn.num_heads


def _in_our_names(whole: dict[str, Tensor], patch: int) -> dict[str, Tensor]:
    """MAE's decoder_pred is our decoder_pixels, with the pixels of a patch in another order."""
    renamed = {name.replace("decoder_pred.", "decoder_pixels."): name for name in whole}
    return {ours: _by_channel(whole[name], patch) if name != ours else whole[name] for ours, name in renamed.items()}


def _by_channel(rows: Tensor, patch: int) -> Tensor:
    """Rows in the order of MAE's patches (row, column, channel) in ours (channel, row, column)."""
    return rows.unflatten(0, (patch, patch, 3)).movedim(2, 0).flatten(0, 2)
