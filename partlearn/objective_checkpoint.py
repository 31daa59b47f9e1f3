"""An objective on disk: its encoder as the model, which `run:DIR` loads, and all the rest as state."""

from pathlib import Path

import torch

from partlearn.config import EncoderConfig
from partlearn.objective import Objective
from partlearn.student import vit_description
from training import checkpoint, distributed


def save(run: Path, step: int, objective: Objective, optimizer: torch.optim.Optimizer, config: EncoderConfig) -> None:
    """Write a checkpoint, on the main rank."""
    if not distributed.is_main():
        return
    vit = {
        **vit_description(objective.encoder, config.size),
        "mean": list(objective.mean),
        "std": list(objective.std),
        "source": "encoder",
    }
    inside = f"{objective.saved}."
    rest = {name: value for name, value in objective.state_dict().items() if not name.startswith(inside)}
    checkpoint.save(
        run,
        step,
        objective.encoder.state_dict(),
        metadata={"vit": vit},
        state={"rest": rest, "optimizer": optimizer.state_dict()},
    )


def resume(run: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> int:
    """Continue from the run's newest checkpoint; returns the steps done."""
    newest = checkpoint.newest(run)
    if newest is None:
        return 0
    encoder, _ = checkpoint.load_tensors(newest / "model.safetensors")
    state = checkpoint.load_state(newest)
    objective.load_state_dict(state["rest"] | {f"{objective.saved}.{name}": each for name, each in encoder.items()})
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
