"""One update of weights from the losses of a step."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def update(
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Float[Tensor, ""]],
    *,
    rate: float | None = None,
    largest_norm: float = math.inf,
) -> tuple[Float[Tensor, ""], float]:
    """One update from the sum of `losses`, each gone backward through as it comes; returns that sum and the norm of its
    gradient. Where the norm is not finite, the weights and the optimizer's state stay as they were.

    Args:
        rate: The learning rate; the optimizer's own where None.
        largest_norm: Gradients of a greater norm are scaled down to it.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    optimizer.zero_grad()
    total = torch.zeros((), device=weights[0].device)
    for loss in losses:
        loss.backward()
        total = total + loss.detach()
    norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    if not math.isfinite(norm.item()):
        return total, math.nan
    if largest_norm < math.inf:
        clip_grads_with_norm_(weights, largest_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if rate is None else rate
    optimizer.step()
    return total, norm.item()
