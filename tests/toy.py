"""A training of one weight, for what the loop promises of any."""

import dataclasses
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from training import distributed
from training.config import RunConfig
from training.loop import train
from training.run_folder import opened
from training.task import Task

STEPS = 30


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    run: RunConfig
    batch_size: int = 2


class Toy(Task):
    """One weight is drawn to 1, from every rank; `spoil(step)` is added to this rank's loss."""

    name, batch_size = "toy", 2

    def __init__(self, spoil: Callable[[int], float] = lambda step: 0.0, *, stays: tuple[int, ...] = ()):
        self.kept, self.shown_at = stays, []
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.0, weight_decay=0.0)
        self.spoil, self.accepted, self.open_files = spoil, [], 0

    def rate(self, step: int) -> float:
        return 0.1 / (1 + step)

    def losses(self, step: int) -> Iterator[Tensor]:
        yield (self.weight - 1).square().sum() * (1 + self.spoil(step))
        distributed.average_gradients([self.weight])

    def accept(self, step: int) -> None:
        self.accepted.append(step)

    def samples(self) -> dict:
        return {"indices": [distributed.rank()]}

    def stays(self, step: int) -> bool:
        return step in self.kept

    def show(self, step: int) -> None:
        self.shown_at.append(step)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight.data}

    def metadata(self) -> dict:
        return {}

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        self.weight.data.copy_(tensors["weight"])

    def open(self, step: int) -> None:
        self.open_files += 1

    def close(self) -> None:
        self.open_files -= 1

    def report(self, step: int) -> dict:
        return {"weight": self.weight.item()}


def config_of(out: Path) -> ToyConfig:
    return ToyConfig(RunConfig(out=out, device="cpu", checkpoint_minutes=1e9))


def run(out: Path, task: Toy, stop: int | None = None) -> dict:
    config = config_of(out)
    with opened(config) as folder:
        return train(task, folder, config.run, total=STEPS, stop_after_steps=stop)


def not_a_number_at(*steps: int) -> Callable[[int], float]:
    return lambda step: math.nan if step in steps else 0.0


def on_two_ranks(
    folder: Path, spoil: Callable[[int], float] = lambda step: 0.0, outs: tuple[str, str] = ("run", "run")
) -> list[int | None]:
    """Exit codes of two processes that train the toy together, each in its folder; `spoil` is the second one's."""

    def process(rank: int) -> None:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        task = Toy(spoil if rank else lambda step: 0.0)
        report = run(folder / outs[rank], task)
        (folder / f"{rank}.json").write_text(json.dumps(report))

    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(timeout=60)
    return [one.exitcode for one in processes]
