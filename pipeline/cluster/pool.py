"""Shards on a pool of Ray actors: a lost actor is replaced, lost work is done again, whoever lives does it."""

import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.cluster.connect import connect

ATTEMPTS = 3
"""Tries of a shard, and of a place in the pool, before what went wrong counts."""
PATIENCE_S = 60.0
"""Seconds without any ready actor between two lines on stderr."""

Outcome = tuple[int, dict[str, Any] | Exception]


def build_on_ray(
    numbers: list[int],
    builder: type,
    arguments: tuple,
    *,
    order: Callable[[int], Any],
    num_workers: int,
    gpus_per_worker: float,
) -> Iterator[Outcome]:
    """What `builder(*arguments).build(order(number))` returns or raises for every number, as it comes.

    A try that raises, or takes its actor with it, yields its exception, and the shard is tried again, after the
    others, until ATTEMPTS tries are spent; the last outcome of a number is the one that counts. A shard that only
    waited at an actor that died has spent no try. Every actor is killed when the iterator ends or is closed.

    Args:
        numbers: The shards.
        builder: A class that every actor makes one of; it loads the models, `build(number)` commits a shard.
        arguments: Of its constructor.
        order: What a builder is sent to build a shard, made when it is sent.
        num_workers: Actors; 0 = as many as fit. Those that cannot be placed hold no work.
        gpus_per_worker: GPU share of an actor, where the cluster has GPUs.

    Raises:
        Exception: What the constructor raised, ATTEMPTS times in one place, and no actor is there to go on.
    """
    import ray

    connect()
    cpus, gpus, most = room(ray.nodes(), gpus_per_worker)
    start = _Starter(ray.remote(num_cpus=cpus, num_gpus=gpus)(_Actor), builder, arguments)
    pool = _Pool(numbers, start, order, min(num_workers or most, len(numbers)))
    try:
        while pool.unfinished:
            done, _ = ray.wait(pool.awaited(), timeout=PATIENCE_S)
            if done:
                yield from pool.take(done[0])
            elif not pool.any_ready():
                _tell_waiting(cpus, gpus)
    finally:
        pool.close()


def on_a_worker(function: Callable[..., Any], *arguments: Any, gpus_per_worker: float) -> Any:
    """What a function returns where a worker of the pool could be: with its share of a node."""
    import ray

    connect()
    cpus, gpus, _ = room(ray.nodes(), gpus_per_worker)
    answer = ray.remote(num_cpus=cpus, num_gpus=gpus)(function).remote(*arguments)
    while not ray.wait([answer], timeout=PATIENCE_S)[0]:
        _tell_waiting(cpus, gpus)
    try:
        return ray.get(answer)
    except ray.exceptions.RayError as error:
        raise _cause(error) from error


def room(nodes: list[dict[str, Any]], gpus_per_worker: float) -> tuple[int, float, int]:
    """CPUs and GPUs an actor asks for, and how many such actors fit on the living nodes (at least one is tried).

    A share of a GPU is on one GPU; no actor is on two nodes.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = gpus_per_worker if any(one.get("GPU") for one in resources) else 0.0
    if not gpus:
        cpus = max(1, min(2, int(max(one.get("CPU", 0) for one in resources))))
        return cpus, 0.0, max(1, sum(int(one.get("CPU", 0) // cpus) for one in resources))
    a_gpu = math.floor(1 / gpus + 1e-6)
    fit = (one.get("GPU", 0) * a_gpu if a_gpu else one.get("GPU", 0) // gpus for one in resources)
    return 1, gpus, max(1, sum(int(min(count, one.get("CPU", 0))) for count, one in zip(fit, resources, strict=True)))


class _Actor:
    """The far end. The builder is made by a call, not by the actor's own constructor: what it raises comes back."""

    def start(self, builder: type, *arguments: Any) -> None:
        self.builder = builder(*arguments)

    def ping(self) -> None:
        pass

    def build(self, order: Any) -> dict[str, Any]:
        return self.builder.build(order)


@dataclass(eq=False)
class _Worker:
    """An actor as its pool sees it."""

    actor: Any
    failed_starts: int
    """Actors in a row that were lost in this place before they were ready."""
    calls: deque[tuple[int | None, Any]] = field(default_factory=deque)
    """Shard and reference, in the order in which Ray runs them; no shard = a ping, or the start."""
    ready: bool = False


@dataclass(frozen=True)
class _Starter:
    remote: Any
    builder: type
    arguments: tuple

    def __call__(self, failed_starts: int) -> _Worker:
        actor = self.remote.remote()
        return _Worker(actor, failed_starts, deque([(None, actor.start.remote(self.builder, *self.arguments))]))


class _Pool:
    """Who does what. A worker gets shards only in answer to a call it has completed, so the dead get none."""

    def __init__(self, numbers: list[int], start: _Starter, order: Callable[[int], Any], num_workers: int):
        self.todo, self.unfinished, self.tries = deque(numbers), len(numbers), Counter[int | None]()
        self.start, self.order = start, order
        self.workers = [start(0) for _ in range(num_workers)]
        self.was_ready = False

    def awaited(self) -> list[Any]:
        """The oldest call of every worker."""
        return [worker.calls[0][1] for worker in self.workers if worker.calls]

    def any_ready(self) -> bool:
        return any(worker.ready for worker in self.workers)

    def take(self, answer: Any) -> Iterator[Outcome]:
        """Deal with a completed call, then hand out what is to do."""
        import ray

        worker = next(one for one in self.workers if one.calls and one.calls[0][1] == answer)
        number, _ = worker.calls.popleft()
        try:
            outcome = ray.get(answer)
        except ray.exceptions.RayError as error:
            outcome = _cause(error)
            if number is not None:
                self._count(number)
            if number is None or not isinstance(error, ray.exceptions.RayTaskError):
                self._replace(worker, outcome)
            else:
                self._give(worker)
        else:
            worker.ready = self.was_ready = True
            self.unfinished -= number is not None
            self._give(worker)
        self._wake()
        if number is not None:
            yield number, outcome

    def close(self) -> None:
        import ray

        if ray.is_initialized():  # else its actors are gone, and ray.kill would start another Ray
            for worker in self.workers:
                ray.kill(worker.actor)

    def _count(self, number: int) -> None:
        """One try of this shard is spent; it comes again after the others, or never."""
        self.tries[number] += 1
        if self.tries[number] < ATTEMPTS:
            self.todo.append(number)
        else:
            self.unfinished -= 1

    def _replace(self, worker: _Worker, cause: Exception) -> None:
        """Another actor instead of one that is lost; shards that waited there come next."""
        import ray

        self.workers.remove(worker)
        ray.kill(worker.actor)  # the network may have failed, not the actor
        self.todo.extendleft(number for number, _ in reversed(worker.calls) if number is not None)
        failed_starts = 0 if worker.ready else worker.failed_starts + 1
        if failed_starts < ATTEMPTS:
            if self.todo:
                self.workers.append(self.start(failed_starts))
        elif not (self.was_ready and self.workers):
            raise cause
        else:
            what = " ".join(f"{type(cause).__name__}: {cause}".split())
            _tell(f"a worker could not be started {ATTEMPTS} times ({what}); {len(self.workers)} workers go on")

    def _give(self, worker: _Worker) -> None:
        """One shard to build and one to wait there; towards the end only the one, that all may share.

        A shard that failed is alone: when a process dies the moment it begins a shard, the answer of the shard before
        may be lost with it, and that one is blamed.
        """
        while self.todo:
            suspect = self.tries[self.todo[0]] or (worker.calls and self.tries[worker.calls[0][0]])
            if worker.calls and (len(worker.calls) == 2 or len(self.todo) < len(self.workers) or suspect):
                return
            number = self.todo.popleft()
            worker.calls.append((number, worker.actor.build.remote(self.order(number))))

    def _wake(self) -> None:
        """Ask those without work whether they live, should there be some again."""
        for worker in self.workers if self.todo else ():
            if not worker.calls:
                worker.calls.append((None, worker.actor.ping.remote()))


def _cause(error: Exception) -> Exception:
    """What was raised at the far end, with Ray's account of it as its cause; or else Ray's error itself."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, Exception):
        return error
    cause.__cause__ = error
    return cause


def _tell_waiting(cpus: int, gpus: float) -> None:
    import ray

    whole, free = ray.cluster_resources(), ray.available_resources()
    has, left = (
        " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")) for resources in (whole, free)
    )
    _tell(
        f"no worker is ready yet: each asks for {cpus} CPU and {gpus:g} GPU, the cluster has {has}, of which {left} "
        "are free; still waiting"
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
