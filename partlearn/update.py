"""One update of the encoder's weights, the same on any number of ranks."""

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from partlearn.config import EncoderConfig
from partlearn.objective import Objective
from training import distributed
from training.schedule import learning_rate

GRADIENT_NORM = 3.0


def new_optimizer(objective: Objective, config: EncoderConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; biases, norms, positions, class and mask token do not decay."""
    trained = [(name, weight) for name, weight in objective.named_parameters() if weight.requires_grad]
    flat = [weight for name, weight in trained if weight.ndim < 2 or name.endswith(("pos_embed", "cls_token"))]
    kept = {id(weight) for weight in flat}
    decayed = [weight for _, weight in trained if id(weight) not in kept]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0)


def train_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    images: UInt8[Tensor, "batch height width 3"],
    config: EncoderConfig,
    *,
    step: int,
    total: int,
) -> dict[str, float]:
    """One update from this rank's block of the batch; returns what the log shows, of the whole batch."""
    per_epoch = total / config.epochs
    rate = learning_rate(
        step,
        peak=config.base_lr * config.batch_size / 256,
        warmup_steps=round(config.warmup_epochs * per_epoch),
        total_steps=total,
        final=1e-6,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    losses = objective.losses(images, step=step)
    optimizer.zero_grad()
    (losses.of_class + losses.of_patch).backward()
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    distributed.average_gradients(trained)  # no DDP: its reductions would meet those of the head's batch norm
    norm = nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
    optimizer.step()
    objective.follow(step / total)
    of_class, of_patch = distributed.mean(torch.stack([losses.of_class, losses.of_patch])).tolist()
    shown = {"loss_class": of_class, "loss_patch": of_patch, **losses.shown}
    return shown | {"lr": rate, "gradient_norm": norm.item()}
