"""MAE as its own code lays it out (arXiv:2111.06377): names, order of pixels, tables, and the loss of one image.

Unlike ours, all patches are embedded and shuffled, the decoder has every patch at its place, and a patch's pixels go
row, column, channel.
"""

import math

import torch
from reference.vit import block, linear, norm
from torch import Tensor


def drawn(*, dim: int, depth: int, patch: int, side: int, decoder_dim: int, decoder_depth: int) -> dict[str, Tensor]:
    """Weights in the names of a checkpoint's `model`, every one at random but the two tables."""
    shapes = {
        "cls_token": (1, 1, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    shapes |= {"mask_token": (1, 1, decoder_dim)}
    for blocks, width, count in (("blocks", dim, depth), ("decoder_blocks", decoder_dim, decoder_depth)):
        for number in range(count):
            place = f"{blocks}.{number}"
            for name in ("norm1", "norm2"):
                shapes |= {f"{place}.{name}.weight": (width,), f"{place}.{name}.bias": (width,)}
            layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
            for name, (out, into) in layers.items():
                shapes |= {
                    f"{place}.{name}.weight": (out * width, into * width),
                    f"{place}.{name}.bias": (out * width,),
                }
    for name, width in (("norm", dim), ("decoder_norm", decoder_dim)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, out, into in (("decoder_embed", decoder_dim, dim), ("decoder_pred", patch * patch * 3, decoder_dim)):
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {"pos_embed": table(dim, side), "decoder_pos_embed": table(decoder_dim, side)}


def table(dim: int, side: int) -> Tensor:
    """Class token 0; then row by row: of the column (which its code calls h) and of the row, sines and cosines."""
    rates = [10_000 ** (-k / (dim // 4)) for k in range(dim // 4)]
    tokens = [[0.0] * dim]
    for row in range(side):
        for col in range(side):
            halves = [[f(place * rate) for f in (math.sin, math.cos) for rate in rates] for place in (col, row)]
            tokens.append(halves[0] + halves[1])
    return torch.tensor([tokens])


def loss(
    weights: dict[str, Tensor], pixels: Tensor, order: list[int], *, kept: int, heads: tuple[int, int], norm_pix: bool
):
    """The loss of an image whose patches are shuffled to `order`, of which the first `kept` are visible."""
    weights = {name: value.double() for name, value in weights.items()}
    patch = weights["patch_embed.proj.weight"].shape[-1]
    depth, decoder_depth = (
        len({name.split(".")[1] for name in weights if name.startswith(f"{blocks}.")})
        for blocks in ("blocks", "decoder_blocks")
    )
    side = pixels.shape[-1] // patch
    cut = [
        pixels.double()[:, row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
        for row in range(side)
        for col in range(side)
    ]
    embedded = [
        (weights["patch_embed.proj.weight"] * one).sum(dim=(1, 2, 3)) + weights["patch_embed.proj.bias"] for one in cut
    ]
    x = torch.stack(embedded) + weights["pos_embed"][0, 1:]
    x = torch.cat([weights["cls_token"][0] + weights["pos_embed"][0, :1], x[order[:kept]]])
    for number in range(depth):
        x = block(weights, f"blocks.{number}", x, heads[0])
    x = linear(weights, "decoder_embed", norm(weights, "norm", x))
    shuffled = torch.cat([x[1:], weights["mask_token"][0].repeat(len(order) - kept, 1)])
    restored = torch.stack([shuffled[order.index(place)] for place in range(len(order))])
    x = torch.cat([x[:1], restored]) + weights["decoder_pos_embed"][0]
    for number in range(decoder_depth):
        x = block(weights, f"decoder_blocks.{number}", x, heads[1])
    x = linear(weights, "decoder_pred", norm(weights, "decoder_norm", x))[1:]
    total = torch.zeros((), dtype=torch.float64)
    for place in order[kept:]:
        target = cut[place].permute(1, 2, 0).flatten()
        if norm_pix:
            target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6) ** 0.5
        total += ((x[place] - target) ** 2).mean()
    return total / (len(order) - kept)
