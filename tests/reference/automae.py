"""AutoMAE (arXiv:2303.06583) as its paper and its released code tell it: an image and a patch at a time, in float64."""

import math

import torch
from reference.mae_step import _positions
from reference.vit import block, linear, norm, patches_of
from torch import Tensor

U, V, KERNEL = "parametrizations.weight.0._u", "parametrizations.weight.0._v", "parametrizations.weight.original"


def convolved(image: Tensor, kernel: Tensor, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
    """Channels of an image, [channels rows cols], under every place of the kernel; zeros around it."""
    channels, rows, cols = image.shape
    wide = torch.zeros(channels, rows + 2 * padding, cols + 2 * padding, dtype=image.dtype)
    wide[:, padding : padding + rows, padding : padding + cols] = image
    side = kernel.shape[-1]
    lines = [
        torch.stack([(kernel * wide[:, top : top + side, left : left + side]).sum(dim=(1, 2, 3)) for left in lefts])
        for top in range(0, wide.shape[1] - side + 1, stride)
        for lefts in [range(0, wide.shape[2] - side + 1, stride)]
    ]
    out = torch.stack(lines).permute(2, 0, 1)
    return out if bias is None else out + bias[:, None, None]


def logits(weights: dict[str, Tensor], attention: Tensor) -> Tensor:
    """Of every patch, row by row; attention is [heads rows cols]."""
    name = "masking.generator.convolutions"
    hidden = convolved(attention, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"], stride=1, padding=1)
    hidden = torch.where(hidden > 0, hidden, 0 * hidden)
    return convolved(hidden, weights[f"{name}.2.weight"], None, stride=1, padding=1).flatten()


def gumbel(draws: list[float]) -> Tensor:
    return torch.tensor([-math.log(-math.log(draw + 2**-25)) for draw in draws], dtype=torch.float64)


def probabilities(log_p: Tensor, noise: Tensor) -> Tensor:
    """Gumbel-softmax at temperature 1 of what a log-softmax gives."""
    tilted = (log_p - log_p.exp().sum().log()) + noise
    return tilted.exp() / tilted.exp().sum()


def scores(p: Tensor, noise: list[float], kept: list[int], selected: int) -> dict[int, Tensor]:
    """Of each kept patch: noise, and half of 1 for the selected, of 0 for the others, with the gradient of p."""
    best = sorted(kept, key=lambda patch: (-p[patch].item(), patch))[:selected]
    hard = {patch: float(patch in best) - p[patch].detach() + p[patch] for patch in kept}
    return {patch: draw + 0.5 * hard[patch] for patch, draw in zip(kept, noise, strict=True)}


def split(found: dict[int, Tensor], visible: int) -> tuple[list[int], list[int]]:
    """The patches of the lowest scores are visible, the others masked; both ascending."""
    ranked = sorted(found, key=lambda patch: (-found[patch].item(), patch))
    masked = ranked[: len(ranked) - visible]
    return sorted(set(found) - set(masked)), sorted(masked)


def reconstruction(weights, config, pixels: Tensor, visible: list[int], masked: list[int], factor) -> Tensor:
    """MAE's loss of an image, where w x + (1 - w) x stands for each visible token x, the second w for its value."""
    patches = patches_of(pixels, config.patch)
    grid = tuple(side // config.patch for side in pixels.shape[-2:])
    where, where_decoded = _positions(config.embed_dim, *grid), _positions(config.decoder_dim, *grid)
    kernel, bias = (weights[f"mae.encoder.patch_embed.proj.{name}"] for name in ("weight", "bias"))
    tokens = [weights["mae.encoder.cls_token"][0, 0]]
    for patch in visible:
        token = kernel.flatten(1) @ patches[patch] + bias + where[patch]
        tokens.append(factor[patch] * token + (1 - factor[patch]).detach() * token)
    x = torch.stack(tokens)
    for number in range(config.depth):
        x = block(weights, f"mae.encoder.blocks.{number}", x, config.heads)
    x = linear(weights, "mae.decoder_embed", norm(weights, "mae.encoder.norm", x))
    seen = [x[1 + place] + where_decoded[patch] for place, patch in enumerate(visible)]
    hidden = [weights["mae.mask_token"][0, 0] + where_decoded[patch] for patch in masked]
    x = torch.stack([x[0], *seen, *hidden])
    for number in range(config.decoder_depth):
        x = block(weights, f"mae.decoder_blocks.{number}", x, config.decoder_heads)
    guesses = linear(weights, "mae.decoder_pixels", norm(weights, "mae.decoder_norm", x))[1 + len(visible) :]
    targets = [(patches[one] - patches[one].mean()) / (patches[one].var() + 1e-6).sqrt() for one in masked]
    return ((guesses - torch.stack(targets)) ** 2).mean()


def kernels(weights: dict[str, Tensor], *, iterate: bool) -> list[Tensor]:
    """The discriminator's, each over its greatest singular value, which a power iteration follows; where `iterate`, by
    one more step, which is kept in `weights`."""
    normalised = []
    for number in (0, 2, 4):
        name = f"masking.discriminator.convolutions.{number}"
        kernel = weights[f"{name}.{KERNEL}"]
        matrix, left, right = kernel.flatten(1), weights[f"{name}.{U}"], weights[f"{name}.{V}"]
        if iterate:
            left = matrix.detach() @ right
            left = left / left.norm()
            right = matrix.detach().T @ left
            right = right / right.norm()
            weights[f"{name}.{U}"], weights[f"{name}.{V}"] = left, right
        normalised.append(kernel / (left @ matrix @ right))
    return normalised


def judged(normalised: list[Tensor], image: Tensor) -> Tensor:
    """The discriminator's output for a map [rows cols], to which zeros are added up to 12 a side; of several the
    mean."""
    down, across = (max(0, 12 - side) for side in image.shape)
    wide = torch.zeros(image.shape[0] + down, image.shape[1] + across, dtype=image.dtype)
    wide[down // 2 : down // 2 + image.shape[0], across // 2 : across // 2 + image.shape[1]] = image
    x = convolved(wide[None], normalised[0], None, stride=2, padding=1)
    x = torch.where(x > 0, x, 0.2 * x)
    x = convolved(x, normalised[1], None, stride=2, padding=1)
    x = torch.where(x > 0, x, 0.2 * x)
    return convolved(x, normalised[2], None, stride=1, padding=0).mean()


def rectangle(draws: list[float], rows: int, cols: int) -> Tensor:
    """A real mask; on 14x14 an area of 40 to 160 patches, 4 to 10 of them wide."""
    (area, width, left, top), noise = draws[:4], draws[4:]
    area = (40 + int(area * 121)) * rows * cols / 196
    width = max(1, round((4 + int(width * 7)) * cols / 14))
    height = min(rows, math.ceil(area / width))
    left, top = int(left * (cols - width + 1)), int(top * (rows - height + 1))
    values = [
        math.exp(noise[row * cols + col] + 0.5 * (left <= col < left + width and top <= row < top + height))
        for row in range(rows)
        for col in range(cols)
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(rows, cols) / sum(values)
