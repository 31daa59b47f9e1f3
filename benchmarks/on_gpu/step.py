"""The pretraining step with real semantic masks: the GPU alone, fed by the stream, and fed with masks as well."""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.on_gpu.against_cpu import SIZE, TOY, drawings
from benchmarks.on_gpu.case import Bars, Bench, Case
from benchmarks.on_gpu.flops import step_flops
from benchmarks.on_gpu.machine import nominal_flops
from benchmarks.on_gpu.timing import peak_memory, quartiles, rate, seconds_of, synchronize
from benchmarks.rounds import Row, exact
from pretrain.config import PretrainConfig, StreamRun
from pretrain.mae import MAE
from pretrain.masking.batch import Masked, mask_batch
from pretrain.train import build, inputs_of, masked_loss, new_optimizer
from shards.batches import Batch
from shards.decode import simplejpeg
from shards.shard_set import ShardSet
from shards.stream import Stream
from training.device import plain_attention_on_cpu
from training.update import update

BATCHES = (256, 512, 1024, 2048)
MOST_TELLING = 1024
"""The batch at which compiled code is looked at first: large enough to fill the card, and it fits 80 GB."""
PRODUCT = 8192
"""Rows and columns of the product that says what the card can do."""
PROGRESS = 0.5
HEAVIEST = 10
BARS: Bars = {"of_nominal": (">=", 0.36), "lost_to_feeding": ("<=", 0.05)}
"""Shares of the card's nominal rate (35.8 % is the highest published one we know: stable-pretraining, two views
through a ViT-L on one H200) and of the time."""

MODELS: dict[str, dict[str, Any]] = {
    "ViT-B/16": {},
    "ViT-B/8 foreground quarter": {"patch": 8, "keep_share": 0.25},
    "ViT-L/16": {"embed_dim": 1024, "depth": 24, "heads": 16},
}


def cases(bench: Bench) -> list[Case]:
    """What is quick first: eager code at every batch, the other models, masks; then compiled code and the kernels."""
    batches, telling = batches_of(bench)
    one_batch = batches[1]
    base, *others = MODELS

    def step(model: str, batch: int, how: str) -> Case:
        measure = partial(_step, bench, model, batch, compiled=how == "compiled")
        return Case(f"{model} {how}, batch {batch}", measure, seconds=75 if how == "compiled" else 8)

    def kernels(how: str) -> Case:
        measure = partial(_kernels, bench, base, telling, compiled=how == "compiled")
        return Case(f"heaviest kernels, {how}", measure, seconds=30 if how == "compiled" else 8)

    later = [
        *(step(base, batch, "compiled") for batch in batches if batch != telling),
        *(step(model, one_batch, "compiled") for model in others),
    ]
    return [
        Case("bf16 product", partial(_product, bench)),
        Case("stream alone", partial(_stream_alone, bench, telling)),
        *(step(base, batch, "eager") for batch in batches),
        *(step(model, one_batch, "eager") for model in others),
        Case("masks", partial(_masks, bench, telling)),
        step(base, telling, "compiled"),
        kernels("eager"),
        kernels("compiled"),
        *([] if bench.rehearse else later),
    ]


def batches_of(bench: Bench) -> tuple[tuple[int, ...], int]:
    """All batches, and the most telling one."""
    return ((4, 8), 8) if bench.rehearse else (BATCHES, MOST_TELLING)


def config_of(bench: Bench, model: str, batch: int) -> PretrainConfig:
    """The run that is measured: bf16, and all cores but two decode: one launches, and the system wants one."""
    threads = max(1, bench.cores - 2)
    run = StreamRun(out=bench.out / "step", device=bench.device, precision="bf16", threads=threads)
    data = str(drawings(bench).shards)
    config = PretrainConfig(data=data, batch_size=batch, run=run, **MODELS[model])
    return dataclasses.replace(config, **TOY) if bench.rehearse else config


@dataclasses.dataclass(frozen=True, slots=True)
class Bed:
    """Everything of a training loop but the loop."""

    config: PretrainConfig
    shards: ShardSet
    device: torch.device
    model: MAE
    stepped: nn.Module
    """The model, or its compiled form."""
    optimizer: torch.optim.Optimizer
    batches: Generator[Batch, None, None]

    def masked(self, batch: Batch) -> Masked:
        return mask_batch(inputs_of(batch, self.config, self.shards), PROGRESS)

    def step(self, masked: Masked) -> torch.Tensor:
        return update(self.optimizer, [masked_loss(self.stepped, masked, self.config, self.device)])[0]

    def ready(self) -> Masked:
        """A masked batch that is on the device already."""
        masked = self.masked(next(self.batches))
        return masked.to(self.device)


@contextmanager
def bed(bench: Bench, model: str, batch: int, *, compiled: bool = False) -> Iterator[Bed]:
    """What `pretrain` sets up, with one thread of torch on the host beside a GPU, as there."""
    config, device = config_of(bench, model, batch), torch.device(bench.device)
    if device.type == "cuda":
        torch.set_num_threads(1)
    with ShardSet.open(config.data) as shards:
        mae = build(config, shards.size).to(device)
        plain_attention_on_cpu(mae, device)
        stepped: Any = mae
        if compiled:
            backend = "aot_eager" if bench.rehearse else "inductor"
            stepped = torch.compile(mae, fullgraph=True, dynamic=False, backend=backend)
        stream = Stream(shards, batch_size=batch, seed=config.seed, flip=config.flip, threads=config.run.threads)
        try:
            with closing(iter(stream)) as batches:
                yield Bed(config, shards, device, mae, stepped, new_optimizer(mae, config), batches)
        finally:
            torch._dynamo.reset()  # it keeps what it compiled, and allows eight forms of one function


def _step(bench: Bench, model: str, batch: int, *, compiled: bool) -> Iterator[Row]:
    """Three rates, how much of the card they use, and where the rest of the time goes."""
    with bed(bench, model, batch, compiled=compiled) as on:
        ready = on.ready()
        if compiled:
            began = time.perf_counter()
            on.step(ready)
            synchronize(bench.device)
            yield exact("compiling", time.perf_counter() - began, "s", 1)
        seconds = bench.measuring(2.0)
        alone = rate("gpu_alone", batch, seconds_of(lambda: on.step(ready), device=bench.device, seconds=seconds))
        yield alone
        flops = alone.value * step_flops(on.config, SIZE)
        if nominal_flops(bench.device):
            yield exact("of_nominal", flops / nominal_flops(bench.device), "share", alone.n)
        yield exact("of_product", flops / product_rate(bench), "share", alone.n)
        yield from peak_memory(bench.device)

        def same_masks(images: Batch) -> Masked:
            return dataclasses.replace(ready, images=torch.from_numpy(images.images))

        yield from _fed(on, same_masks, "with_stream", seconds)
        fed, *shares = _fed(on, on.masked, "with_stream_and_masks", seconds)
        yield from (fed, *shares)
        yield exact("lost_to_feeding", 1 - fed.value / alone.value, "share", fed.n)


def _fed(on: Bed, masked: Callable[[Batch], Masked], name: str, seconds: float) -> Iterator[Row]:
    """The rate of steps on batches of the stream; and the shares of the time in which the host waited for them and made
    masks. It runs ahead of the device, which may be busy meanwhile: only `lost_to_feeding` is time lost."""
    waited, masking = [], []

    def step() -> None:
        began = time.perf_counter()
        batch = next(on.batches)
        there = time.perf_counter()
        ready = masked(batch)
        waited.append(there - began)
        masking.append(time.perf_counter() - there)
        on.step(ready)

    taken = seconds_of(step, device=on.device.type, seconds=seconds)
    fed = rate(name, on.config.batch_size, taken)
    yield fed
    for what, spent in (("host_waits_for_stream", waited), ("host_makes_masks", masking)):
        late = spent[len(spent) // 2 :]  # the first ones were decoded before
        yield exact(f"{name}_{what}", float(np.mean(late)) / (on.config.batch_size / fed.value), "share", len(late))


def product_rate(bench: Bench) -> float:
    """FLOP/s of a large bf16 product here and now, on random numbers (zeros go faster)."""
    side = 256 if bench.rehearse else PRODUCT
    one, other = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    taken = seconds_of(lambda: one @ other, device=bench.device, seconds=0.3)
    return 2 * side**3 / sorted(taken)[len(taken) // 2]


def _product(bench: Bench) -> Iterator[Row]:
    reached = product_rate(bench)
    yield exact("reached", reached / 1e12, "TFLOP/s", 1)
    if nominal_flops(bench.device):
        yield exact("product_of_nominal", reached / nominal_flops(bench.device), "share", 1)


def _stream_alone(bench: Bench, batch: int) -> Iterator[Row]:
    """What the readers give to somebody who does nothing with it."""
    with bed(bench, "ViT-B/16", batch) as on:
        seconds = bench.measuring(3.0)
        yield rate("images", batch, seconds_of(lambda: next(on.batches), device="cpu", seconds=seconds))
        yield exact("threads", on.config.run.threads, "threads", 1)
        yield exact("simplejpeg", float(simplejpeg is not None), "1 there, 0 Pillow", 1)
        yield quartiles("jpeg", "bytes", [float(len(on.shards.read(at).jpeg)) for at in range(len(on.shards))])


def _masks(bench: Bench, batch: int) -> Iterator[Row]:
    """Masks of a batch on the host, in line with the step as today, and on the device."""
    for model in ("ViT-B/16", "ViT-B/8 foreground quarter"):
        with bed(bench, model, batch) as on:
            one = next(on.batches)
            for where, device in (("host", torch.device("cpu")), ("device", on.device)):
                mask = partial(_mask, one, on, device)
                taken = seconds_of(mask, device=bench.device, seconds=bench.measuring(0.4))
                each = [1e6 * seconds / batch for seconds in taken]
                yield quartiles(f"patch_{on.config.patch}_on_{where}", "us/image", each)


def _mask(batch: Batch, on: Bed, device: torch.device) -> Masked:
    return mask_batch(inputs_of(batch, on.config, on.shards, device), PROGRESS)


def _kernels(bench: Bench, model: str, batch: int, *, compiled: bool) -> Iterator[Row]:
    """The kernels that a step spends most time in, by name."""
    device, steps = bench.device, 3
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with bed(bench, model, batch, compiled=compiled) as on:
        ready = on.ready()
        for _ in range(steps):
            on.step(ready)
        synchronize(device)
        with torch.profiler.profile(activities=[activity]) as profile:
            for _ in range(steps):
                on.step(ready)
            synchronize(device)
    events = [event for event in profile.key_averages() if not event.is_user_annotation]  # those hold kernels
    spent = {event.key: _microseconds(event, device) for event in events}
    whole = sum(spent.values())
    if not whole:
        raise RuntimeError("the profiler saw no kernel: CUPTI is missing or refused here")
    for place, name in enumerate(sorted(spent, key=lambda name: -spent[name])[:HEAVIEST], start=1):
        shown = " ".join(name.split())
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        yield exact(f"kernel {place}: {shown}", spent[name] / whole, "share", steps)


def _microseconds(event: Any, device: str) -> float:
    """Of a kernel on the device; on a CPU, of an operator."""
    return event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
