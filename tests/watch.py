"""What PyTorch sees go by while a verb runs: nothing of ours is replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook


@dataclass
class Watched:
    """Calls of one kind of module, and steps of any optimizer, in their order."""

    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    """The module of each call."""
    initial: dict[str, Tensor] = field(default_factory=dict)
    """The first module's parameters at its first call."""
    steps: list[list[dict[str, Any]]] = field(default_factory=list)
    """The parameter groups of each step: its settings, and under `params` the weights themselves."""

    def rates(self) -> list[list[float]]:
        return [[group["lr"] for group in groups] for groups in self.steps]


@contextmanager
def watching(kind: type[nn.Module]) -> Iterator[Watched]:
    """Note every call of a `kind` and every step of an optimizer made inside."""
    watched = Watched()

    def called(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if not isinstance(module, kind):
            return
        watched.modules.append(module)
        watched.inputs.append(tuple(_kept(one) for one in arguments))
        watched.outputs.append(_kept(output))
        if not watched.initial:
            watched.initial = {name: _kept(one) for name, one in module.named_parameters()}

    def stepped(optimizer: torch.optim.Optimizer, arguments: Any, named: Any) -> None:
        watched.steps.append([dict(group) for group in optimizer.param_groups])

    hooks = [register_module_forward_hook(called), register_optimizer_step_pre_hook(stepped)]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
