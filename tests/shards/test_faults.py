"""G1, G3, G4: a build that is killed at any step, or that runs out of room, ends after a rerun with the same bytes."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import drawn

from shards.atomic import sha256_file
from shards.build import finalise, open_plan, shard_done
from shards.verify import verify
from shards.writer import write_shard

ROOT = Path(__file__).parents[2]

BUILD = """
import os, pickle, signal, sys
from itertools import count
from pathlib import Path
from shards.build import finalise, open_plan, shard_done
from shards.sample import Rejected
from shards.verify import verify
from shards.writer import write_shard

STEPS = ("open", "os.rename", "os.remove", "os.mkdir")
samples = pickle.load(sys.stdin.buffer)


def build(folder):
    folder.mkdir(exist_ok=True)
    digest = open_plan(folder, {"seed": 0, "samples_per_shard": 5})
    for number in range(2):
        if not shard_done(folder, number, digest):
            rejected = [Rejected("bad.jpg", 8, "decode", "torn")] if number else []
            slice_ = samples[5 * number : 5 * number + 5]
            write_shard(folder, number, slice_, groups=4, plan_digest=digest, rejected=rejected)
    info = {"grid": 4, "groups": 4, "size": 16, "classes": [], "inputs": {"count": 9}}
    finalise(folder, shard_count=2, plan_digest=digest, info=info)


def in_a_child(work):
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(step, folder):
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in STEPS and str(folder) in str(arguments):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    build(folder)


def no_reader_is_fooled(folder):
    assert not (folder / "dataset.json").exists() or verify(folder, "deep") == []


root = Path(sys.argv[1])
build(root / "warm")  # pyarrow imports pandas in a first build: once here, not in every child
for step in count(1):
    folder = root / f"killed-{step}"
    status = in_a_child(lambda: killed_at(step, folder))
    assert in_a_child(lambda: no_reader_is_fooled(folder)) == 0, step
    assert in_a_child(lambda: build(folder)) == 0, step
    if not status:
        break
    assert status == signal.SIGKILL, status
print(step - 1)
"""


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def test_killed_at_every_step_of_every_commit_it_ends_with_the_same_bytes(tmp_path):
    """Every open, rename, removal and mkdir of a build of two shards is the last thing one of the builds does.

    The build that no kill reached is the reference: it is the last folder.
    """
    samples = pickle.dumps(list(drawn(8, 16, 4, 4, 0, 0)))
    command = [sys.executable, "-c", BUILD, str(tmp_path)]

    done = subprocess.run(command, input=samples, cwd=ROOT, capture_output=True, timeout=250, check=False)

    assert done.returncode == 0, done.stderr.decode()[-2000:]
    kills = int(done.stdout)
    straight = digests(tmp_path / f"killed-{kills + 1}")
    assert kills > 25
    assert len(straight) == 2 * 3 + 4
    for step in range(1, kills + 1):
        assert digests(tmp_path / f"killed-{step}") == straight, step


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB; mounting one is for root alone."""
    folder = tmp_path / "builtin"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_and_a_rerun_with_room_gives_the_same_bytes(small_disk, tmp_path):
    samples = list(drawn(40, 16, 4, 4, 0, 0))
    info = {"grid": 4, "groups": 4, "size": 16, "classes": [], "inputs": {"count": 40}}

    def build_all(folder: Path) -> None:
        digest = open_plan(folder, {"seed": 0})
        for number in range(10):
            if not shard_done(folder, number, digest):
                slice_ = samples[4 * number : 4 * number + 4]
                write_shard(folder, number, slice_, groups=4, plan_digest=digest, rejected=[])
        finalise(folder, shard_count=10, plan_digest=digest, info=info)

    (tmp_path / "straight").mkdir()
    build_all(tmp_path / "straight")

    with pytest.raises(OSError, match="No space left on device"):
        build_all(small_disk)
    kept = sorted(path.name for path in (small_disk / "shards").glob("*.json"))
    torn = [path for path in small_disk.rglob(".*") if path.is_file()]
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    build_all(small_disk)

    assert 0 < len(kept) < 10
    assert torn == []
    assert digests(small_disk) == digests(tmp_path / "straight")
    assert verify(small_disk, "deep") == []
