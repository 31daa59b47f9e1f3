"""The pool of Ray actors, on a cluster of small nodes that fail in every way we know."""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import drawn, photographs, tars

import pipeline.extract
from partlearn.config import ExtractConfig
from pipeline.cluster import pool
from pipeline.cluster.pool import ATTEMPTS, build_on_ray, room
from shards.atomic import read_json
from shards.build import finalise, open_plan
from shards.errors import ShardError
from shards.sample import LabelledImage
from shards.verify import verify
from shards.writer import write_shard
from training.config import RunConfig
from training.device import computed_here

ROOT = Path(__file__).parents[3]
GROUPS, SAMPLES, SHARDS = 4, 4, 6
Samples = list[list[LabelledImage]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each on loopback, this process the driver; they leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # short, for its sockets, and apart from any other Ray on this machine
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray
        from ray.cluster_utils import Cluster

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test
        cluster = Cluster(initialize_head=True, head_node_args=NODE, shutdown_at_exit=False)
        try:
            cluster.add_node(**NODE)
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


def until(seen: Callable[[], Any], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not seen():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


def node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


class Noise:
    """Builds shards of noise; each line of its notes is a process. The subclasses fail."""

    def __init__(self, folder: Path, notes: Path, digest: str, samples: Samples):
        self.folder, self.notes, self.digest, self.samples = folder, notes, digest, samples

    def build(self, number: int) -> dict[str, Any]:
        self.note(f"shard-{number}")
        return write_shard(
            self.folder, number, self.slowly(number), groups=GROUPS, plan_digest=self.digest, rejected=[]
        )

    def slowly(self, number: int) -> Iterator[LabelledImage]:
        yield from self.samples[number][: SAMPLES // 2]
        self.half_way(number)
        yield from self.samples[number][SAMPLES // 2 :]

    def half_way(self, number: int) -> None:
        """Where a subclass fails."""

    def note(self, name: str) -> int:
        """How often this was noted, now included."""
        with open(self.notes / name, "a") as file:
            file.write(f"{os.getpid()}\n")
        return len((self.notes / name).read_text().split())


class OnALostNode(Noise):
    """On one node it stops half-way through a shard, for good; the others wait until it has."""

    def half_way(self, number: int) -> None:
        if node_id() == (self.notes / "lost").read_text():
            self.note("half-way")
            time.sleep(600)
        until((self.notes / "half-way").exists)


class Killed(Noise):
    """Shard 1 takes every process with it, at once."""

    def half_way(self, number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Raising(Noise):
    """Shard 1 always raises, shard 3 once."""

    def half_way(self, number: int) -> None:
        if number == 1 or (number == 3 and self.note("once") == 1):
            raise OSError(f"no room for shard {number}")


class WithoutWeights(Noise):
    """Cannot be made."""

    def __init__(self, folder: Path, notes: Path, *_: Any):
        self.notes = notes
        self.note("made")
        raise FileNotFoundError("no weights here")


class NotHere(Noise):
    """Cannot be made on one node, and builds nothing on the others before that was tried."""

    def __init__(self, folder: Path, notes: Path, digest: str, samples: Samples):
        super().__init__(folder, notes, digest, samples)
        if node_id() == (notes / "bad").read_text():
            until((notes / "good").exists)
            self.note("bad-made")
            raise MemoryError("too small a node")
        self.note("good")

    def half_way(self, number: int) -> None:
        until((self.notes / "bad-made").exists)


class Troubled(pipeline.extract.OnActor):
    """The real one; shard 1 takes its process with it once, half-way, and shard 2 always raises there."""

    def build(self, slice_: Any) -> dict[str, Any]:
        labeller: Any = self.labeller
        failing: Any = FailingLabeller(labeller, slice_.number, self.config.run.out.parent)
        self.labeller = failing
        try:
            return super().build(slice_)
        finally:
            self.labeller = labeller


def troubled_on_ray(numbers: list[int], builder: type, arguments: tuple, **named: Any) -> Iterator[tuple[int, Any]]:
    """The pool, told to take the troubled builder; the real one keeps its name, by which its actors import it."""
    assert issubclass(Troubled, builder)
    return build_on_ray(numbers, Troubled, arguments, **named)


class FailingLabeller:
    def __init__(self, labeller: Any, shard: int, notes: Path):
        self.labeller, self.shard, self.notes, self.calls = labeller, shard, notes, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.labeller, name)

    def label(self, batch: Any) -> Any:
        self.calls += 1
        if (self.shard, self.calls) == (1, 2) and not (self.notes / "killed").exists():
            (self.notes / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.shard, self.calls) == (2, 2):
            raise RuntimeError("out of memory")
        return self.labeller.label(batch)


class Set:
    """A shard set of noise, and the same set built in this process."""

    def __init__(self, folder: Path):
        self.out, self.local, self.notes = folder / "out", folder / "local", folder / "notes"
        for made in (self.out, self.local, self.notes):
            made.mkdir()
        self.digest = open_plan(self.out, {"seed": 0})
        every = list(drawn(SAMPLES * SHARDS, 32, 4, GROUPS, 3, seed=0))
        self.samples = [every[number * SAMPLES : (number + 1) * SAMPLES] for number in range(SHARDS)]

    def build(self, builder: type, *, num_workers: int = 0) -> Iterator[tuple[int, Any]]:
        import ray

        arguments = (self.out, self.notes, self.digest, ray.put(self.samples))
        return build_on_ray(
            list(range(SHARDS)), builder, arguments, order=int, num_workers=num_workers, gpus_per_worker=1.0
        )

    def noted(self, name: str) -> list[str]:
        """Processes that noted this."""
        path = self.notes / name
        return path.read_text().split() if path.exists() else []

    def assert_as_local(self) -> None:
        builder = Noise(self.local, self.notes, open_plan(self.local, {"seed": 0}), self.samples)
        for number in range(SHARDS):
            builder.build(number)
        for folder in (self.out, self.local):
            info: dict[str, Any] = {"grid": 4, "groups": GROUPS, "size": 32, "classes": ["a", "b", "c"]}
            info["inputs"] = {"count": SAMPLES * SHARDS}
            finalise(folder, shard_count=SHARDS, plan_digest=self.digest, info=info)
        assert verify(self.out, "deep") == []
        assert tars(self.out) == tars(self.local)


@pytest.fixture
def set_(cluster, tmp_path) -> Set:
    return Set(tmp_path)


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def third_node(cluster) -> Iterator[Any]:
    """One node more, while the test lasts."""
    node = cluster.add_node(**NODE)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


def test_a_node_lost_in_the_middle_of_a_shard_costs_nothing_but_time(cluster, third_node, set_):
    (set_.notes / "lost").write_text(third_node.node_id)

    def remove() -> None:
        until((set_.notes / "half-way").exists)
        cluster.remove_node(third_node, allow_graceful=False)

    remover = threading.Thread(target=remove)
    remover.start()
    outcomes = list(set_.build(OnALostNode))
    remover.join()

    failed = [number for number, outcome in outcomes if isinstance(outcome, Exception)]
    assert len(failed) == 1  # the shard that was being built, not the one that waited
    assert sorted(number for number, outcome in outcomes if isinstance(outcome, dict)) == list(range(SHARDS))
    set_.assert_as_local()


def test_extract_survives_a_killed_process_and_names_a_shard_that_failed(
    cluster, learned, tmp_path, monkeypatch, capsys
):
    photos = photographs(tmp_path / "photos", 32)

    def extract(out: Path, backend: str) -> None:
        run = RunConfig(out=out, device="cpu", precision="fp32", threads=1)
        settings: Any = {"size": 32, "samples_per_shard": 8, "batch_size": 4, "backend": backend}
        pipeline.extract.extract(ExtractConfig(images=str(photos), parts=learned, run=run, **settings))

    extract(tmp_path / "local", "local")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.extract, "build_on_ray", troubled_on_ray)
        with pytest.raises(ShardError, match="1 of 4 shards failed 3 times, first shard 2 with RuntimeError: out of"):
            extract(tmp_path / "out", "ray")
    built = sorted(path.name for path in (tmp_path / "out/shards").glob("*.json"))
    extract(tmp_path / "out", "local")

    assert built == ["000000.json", "000001.json", "000003.json"]
    assert (tmp_path / "killed").exists()
    assert "retries 3" in capsys.readouterr().err.splitlines()[-1]  # one of shard 1, two of shard 2
    assert verify(tmp_path / "out", "deep") == []
    assert tars(tmp_path / "out") == tars(tmp_path / "local")


def test_labels_are_computed_on_what_a_worker_finds(cluster, learned, tmp_path):
    photos = photographs(tmp_path / "photos", 4)
    settings: Any = {"size": 32, "samples_per_shard": 4, "batch_size": 4, "backend": "ray"}
    run = RunConfig(out=tmp_path / "out", device="auto", threads=1)

    pipeline.extract.extract(ExtractConfig(images=str(photos), parts=learned, run=run, **settings))

    found = computed_here("auto", "auto")
    for file in (tmp_path / "out/plan.json", tmp_path / "out/shards/000000.json"):
        assert {name: read_json(file)[name] for name in found} == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_worker_without_the_device_of_the_plan_says_so(learned, tmp_path):
    run = RunConfig(out=tmp_path / "out", device="cuda", precision="fp32")

    with pytest.raises(ValueError, match=r"computed with --device cuda --precision fp32, and a worker has .*cpu alone"):
        pipeline.extract.OnActor(ExtractConfig(images="photos", parts=learned, run=run), "digest", None)


def test_a_shard_that_always_raises_is_tried_three_times_and_the_others_are_built(set_):
    outcomes = list(set_.build(Raising))

    failed = [number for number, outcome in outcomes if isinstance(outcome, OSError)]
    assert sorted(failed) == [1, 1, 1, 3]
    assert len(set_.noted("shard-1")) == ATTEMPTS
    assert sorted(number for number, outcome in outcomes if isinstance(outcome, dict)) == [0, 2, 3, 4, 5]


def test_a_shard_that_kills_every_process_fails_alone(set_):
    outcomes = list(set_.build(Killed, num_workers=1))

    assert [number for number, outcome in outcomes if isinstance(outcome, Exception)].count(1) == ATTEMPTS
    assert {number for number, outcome in dict(outcomes).items() if isinstance(outcome, Exception)} == {1}


def test_an_actor_that_can_be_made_nowhere_ends_the_build_with_its_cause(set_):
    with pytest.raises(FileNotFoundError, match="no weights here"):
        list(set_.build(WithoutWeights, num_workers=1))

    assert len(set_.noted("made")) == ATTEMPTS


def test_a_node_where_no_actor_can_be_made_is_done_without(cluster, set_):
    (bad,) = cluster.worker_nodes
    (set_.notes / "bad").write_text(bad.node_id)

    outcomes = list(set_.build(NotHere))

    assert sorted(number for number, outcome in outcomes if isinstance(outcome, dict)) == list(range(SHARDS))
    assert 1 <= len(set_.noted("bad-made")) <= ATTEMPTS


def test_more_workers_than_can_be_placed_are_as_good_as_those_that_can(set_):
    outcomes = list(set_.build(Noise, num_workers=5))

    assert sorted(number for number, _ in outcomes) == list(range(SHARDS))
    assert not [outcome for _, outcome in outcomes if isinstance(outcome, Exception)]


def test_who_stops_early_leaves_no_actor_behind(set_):
    outcomes = set_.build(Noise)
    number, _ = next(outcomes)
    (process,) = set_.noted(f"shard-{number}")

    outcomes.close()

    until(lambda: not lives(process), timeout_s=10)


def test_waiting_for_a_first_actor_is_told(cluster, set_, monkeypatch, capsys):
    """Both CPUs are taken; once they are free, the build goes on."""
    import ray

    class Holder:
        pass

    monkeypatch.setattr(pool, "PATIENCE_S", 0.2)
    holders: list[Any] = [ray.remote(num_cpus=1)(Holder).remote() for _ in range(2)]
    ray.get([holder.__ray_ready__.remote() for holder in holders])
    until(lambda: ray.cluster_resources()["CPU"] == 2 and not ray.available_resources().get("CPU"))
    release = threading.Timer(1.0, lambda: [ray.kill(holder) for holder in holders])
    release.start()

    outcomes = list(set_.build(Noise))
    release.join()

    assert len(outcomes) == SHARDS
    told = capsys.readouterr().err.splitlines()[0]
    assert told == (
        "no worker is ready yet: each asks for 1 CPU and 0 GPU, the cluster has 2 CPU and 0 GPU, of which 0 CPU and "
        "0 GPU are free; still waiting"
    )


def test_actors_are_packed_onto_nodes_and_into_gpus():
    def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": one} for one in resources]

    assert room(nodes({"CPU": 1}, {"CPU": 1}), 1.0) == (1, 0.0, 2)
    assert room(nodes({"CPU": 8}, {"CPU": 5}, {}), 1.0) == (2, 0.0, 6)
    assert room(nodes({"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 2}, {"CPU": 64}), 1.0) == (1, 1.0, 6)
    assert room(nodes({"CPU": 16, "GPU": 4}), 0.5) == (1, 0.5, 8)
    assert room(nodes({"CPU": 16, "GPU": 4}), 0.4) == (1, 0.4, 8)
    assert room(nodes({"CPU": 30, "GPU": 1}), 0.1) == (1, 0.1, 10)
    assert room(nodes({"CPU": 3, "GPU": 4}), 0.5) == (1, 0.5, 3)
    assert room(nodes({"CPU": 8, "GPU": 3}), 2.0) == (1, 2.0, 1)
    assert room(nodes({"CPU": 8, "GPU": 1}), 0.0) == (2, 0.0, 4)
    assert room([*nodes({"CPU": 1}), {"Alive": False, "Resources": {"CPU": 9, "GPU": 9}}], 1.0) == (1, 0.0, 1)
