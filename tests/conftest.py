"""Small real things that several tests need."""

import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from pyarrow import fs

from partlearn.config import LearnConfig
from partlearn.train import learn
from shards import storage
from shards.build import finalise, open_plan
from shards.sample import LabelledImage
from shards.shard_set import ShardSet
from shards.writer import write_shard
from training.config import RunConfig

settings.register_profile("busy", deadline=None)  # what else the machine does is no fault of an example
settings.load_profile("busy")
torch.set_num_threads(1)  # on these images of 32 pixels a second thread waits longer than it computes
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process that a test starts compiles torch, for 10 s

SLOW = {
    "benchmarks": ("test_bench", "test_gpu", "test_gpu_sections"),
    "encoders": ("test_monitor",),
    "encoders/distill": ("test_from_teacher", "test_ranks", "test_train"),
    "evaluate": ("test_kept", "test_rows"),
    "evaluate/parts": ("test_score",),
    "partlearn": ("test_decoder", "test_oracle", "test_ranks", "test_train"),
    "pipeline": ("test_extract", "test_one_kind", "test_relabel"),
    "pipeline/cluster": ("test_pool", "test_ray", "test_submit"),
    "pipeline/figures": ("test_parts_sheet",),
    "pretrain": ("test_every_masking", "test_interruption", "test_overfit", "test_run", "test_train"),
    "pretrain/masking": ("test_automae",),
    "shards": ("test_faults",),
    ".": ("test_end_to_end", "test_wheel"),
}
"""Files whose tests start Ray or processes, or learn: `make test-fast` leaves them out, with every test that needs
learned parts. A single such test in another file is marked where it stands."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    slow = {here / folder / f"{name}.py" for folder, names in SLOW.items() for name in names}
    for item in items:
        if item.path in slow or "learned" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


def drawn(
    count: int, size: int, grid: int, groups: int, classes: int, seed: int, heads: int = 0
) -> Iterator[LabelledImage]:
    """Images of noise in a class's colour, with random labels and ranks, and attention of so many heads."""
    random = np.random.default_rng(seed)
    for number in range(count):
        class_id = number % classes if classes else -1
        pixels = random.integers(0, 120, (size, size, 3)) + np.array([40 * max(0, class_id), 60, 0])
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        yield LabelledImage(
            key=f"{number:08d}",
            source=f"{class_id}/{number}.jpg",
            class_id=class_id,
            jpeg=buffer.getvalue(),
            parts=random.integers(0, groups, (grid, grid)).astype(np.uint8),
            fgrank=random.permutation(grid * grid).astype(np.uint16).reshape(grid, grid),
            src_width=size,
            src_height=size,
            box=(0.0, 0.0, float(size), float(size)),
            **(attention(np.random.default_rng([seed, number]), heads, grid) if heads else {}),
        )


def attention(random: np.random.Generator, heads: int, grid: int) -> dict[str, np.ndarray]:
    """Of an image, as it is stored: bytes of which the greatest of each head is 255, and what that stands for."""
    attn = random.integers(0, 255, (heads, grid, grid)).astype(np.uint8)
    attn[:, 0, random.integers(grid)] = 255
    return {"attn": attn, "attn_peak": random.random(heads, np.float32)}


def write_set(
    folder: Path, *, count=40, size=32, grid=4, groups=4, classes=3, samples_per_shard=16, seed=0, heads=0
) -> Path:
    """A finished shard set, through the real writer."""
    info = {"grid": grid, "groups": groups, "size": size, "classes": [f"class{number}" for number in range(classes)]}
    info |= {"heads": heads} if heads else {}
    samples = drawn(count, size, grid, groups, classes, seed, heads)
    return write_samples(folder, samples, info, samples_per_shard=samples_per_shard, seed=seed)


def write_samples(
    folder: Path, images: Iterable[LabelledImage], info: dict, *, samples_per_shard: int, seed: int = 0
) -> Path:
    """A finished shard set of given samples."""
    samples = list(images)
    folder.mkdir(parents=True, exist_ok=True)
    digest = open_plan(folder, {"seed": seed, "inputs": len(samples)})
    shards = -(-len(samples) // samples_per_shard)
    for number in range(shards):
        slice_ = samples[number * samples_per_shard : (number + 1) * samples_per_shard]
        write_shard(folder, number, slice_, groups=info["groups"], plan_digest=digest, rejected=[])
    whole = {"producer": {"seed": seed}} | info | {"inputs": {"count": len(samples)}}
    finalise(folder, shard_count=shards, plan_digest=digest, info=whole)
    return folder


@pytest.fixture
def make_shards(tmp_path) -> Callable[..., ShardSet]:
    """A function that writes a shard set and opens it."""
    made = []

    def make(name: str = "shards", **settings) -> ShardSet:
        made.append(ShardSet.open(write_set(tmp_path / name, **settings)))
        return made[-1]

    yield make
    for shards in made:
        shards.close()


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every account may look into, where pytest's own are this one's alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve()
        path.chmod(0o755)
        yield path
        path.chmod(0o755)


@pytest.fixture
def another_account() -> Callable[[], AbstractContextManager[None]]:
    """A context in which this process has the rights of an account that owns nothing; root's rights end there."""

    @contextmanager
    def switched() -> Iterator[None]:
        before = os.geteuid()
        if before:
            yield  # no root: the modes that a test sets bind its own account too
            return
        os.seteuid(54321)
        try:
            yield
        finally:
            os.seteuid(before)

    return switched


def assert_near(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Weights of a few small steps that may differ in rounding alone; those that order losses by their differences,
    which cancel, in more of it."""
    for name in one:
        most = 1e-5 if name.startswith("masking.") else 3e-6
        difference = (one[name] - two[name]).abs()
        if name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, which Adam blows up to a whole step
            difference = difference.unflatten(0, (3, -1))[[0, 2]]
        assert difference.max().item() < most, name


def photographs(folder: Path, count: int) -> Path:
    """A folder of small JPEGs of coloured blobs."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 255, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(folder / f"{number:03d}.jpg")
    return folder


def small_parts(run: Path, **changes) -> Path:
    """A part learner of two steps on random features: poor parts, real machinery."""
    run.mkdir()
    settings = {"grid": 4, "num_parts": 3, "crops": 1, "steps": 2, "batch_size": 4} | changes
    config = LearnConfig(
        images=str(photographs(run / "photos", 6)),
        encoder="random:vit_tiny_patch16_224",
        run=RunConfig(out=run / "run", device="cpu", precision="fp32"),
        **settings,
    )
    learn(config)
    return run / "run"


def tars(out: Path) -> dict[str, str]:
    """SHA-256 of every tar and of the merged index."""
    files = [*sorted((out / "shards").glob("*.tar")), out / "index.parquet"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def open_files(folder: Path) -> list[str]:
    """The tars that this process has open in a folder; the kernel (Linux alone) marks deleted ones."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("open files cannot be listed here")
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(link.readlink()))
    return [name for name in found if name.startswith(str(folder)) and ".tar" in name]


@pytest.fixture(scope="session")
def learned(tmp_path_factory) -> Path:
    """The run folder of one part learner, for every test that only reads it."""
    return small_parts(tmp_path_factory.mktemp("learned") / "run")


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """A real S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_address, monkeypatch) -> Iterator[fs.FileSystem]:
    """A connection that may write, and the environment in which ours connects; the bucket is `images`."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    store = fs.S3FileSystem(endpoint_override=s3_address, region="us-east-1", allow_bucket_creation=True)
    store.create_dir("images")
    storage._store.cache_clear()
    yield store
    store.delete_dir_contents("images")
    storage._store.cache_clear()
