"""MAE's LARS for one parameter, one step at a time (from the description in arXiv:1708.03888 and MAE's settings)."""

import torch
from torch import Tensor


def lars_steps(start: Tensor, gradients: list[Tensor], *, lr: float, momentum=0.9, trust=0.001) -> Tensor:
    """Matrices move along gradient · trust · |w| / |gradient|, vectors along the plain gradient; both with momentum."""
    weight, velocity = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        move = gradient.clone()
        if weight.ndim > 1 and weight.norm() > 0 and gradient.norm() > 0:
            move = move * (trust * weight.norm() / gradient.norm())
        velocity = momentum * velocity + move
        weight = weight - lr * velocity
    return weight
