"""A ViT's parts by their definitions, one image at a time, and AdamW for weights by name."""

import torch
from torch import Tensor


def patches_of(pixels: Tensor, patch: int) -> Tensor:
    """Patches row by row; within one, channel, then row, then column."""
    rows, cols = (side // patch for side in pixels.shape[-2:])
    cut = [
        pixels[:, row * patch : (row + 1) * patch, col * patch : (col + 1) * patch].flatten()
        for row in range(rows)
        for col in range(cols)
    ]
    return torch.stack(cut)


def block(weights: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Attention, then two layers; each of what is normalised, each added."""
    queries, keys, values = linear(weights, f"{name}.attn.qkv", norm(weights, f"{name}.norm1", x)).chunk(3, dim=1)
    width = x.shape[1] // heads
    mixed = []
    for first in range(0, x.shape[1], width):
        q, k, v = (every[:, first : first + width] for every in (queries, keys, values))
        mixed.append(torch.softmax(q @ k.T / width**0.5, dim=1) @ v)
    x = x + linear(weights, f"{name}.attn.proj", torch.cat(mixed, dim=1))
    inner = linear(weights, f"{name}.mlp.fc1", norm(weights, f"{name}.norm2", x))
    gelu = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    return x + linear(weights, f"{name}.mlp.fc2", gelu)


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x Wᵀ + b."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Each row less its mean, over its deviation (1e-6 inside the root), then scale and shift."""
    centred = x - x.mean(dim=1, keepdim=True)
    deviation = ((centred**2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


class AdamW:
    """Decay of some weights, apart from the gradient, then Adam's step with bias correction (arXiv:1711.05101)."""

    def __init__(self, weights: dict[str, Tensor], *, betas: tuple[float, float], decay: float, decayed: set[str]):
        self.weights, self.betas, self.decay, self.decayed, self.steps = weights, betas, decay, decayed, 0
        self.first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def step(self, gradients: dict[str, Tensor], rate: float) -> None:
        self.steps += 1
        one, two = self.betas
        for name, gradient in gradients.items():
            weight = self.weights[name]
            self.first[name] = one * self.first[name] + (1 - one) * gradient
            self.second[name] = two * self.second[name] + (1 - two) * gradient**2
            mean = self.first[name] / (1 - one**self.steps)
            square = self.second[name] / (1 - two**self.steps)
            weight = weight - rate * self.decay * weight if name in self.decayed else weight
            self.weights[name] = weight - rate * mean / (square.sqrt() + 1e-8)
