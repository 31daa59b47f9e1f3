"""S4, S8 and G3 for copies of a slow or remote set: the same stream, within the stated size, nothing torn taken for
whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import open_files, write_set
from pyarrow import fs

from shards.atomic import read_json, sha256_file
from shards.batches import in_order
from shards.errors import ShardError
from shards.order import Epochs
from shards.shard_set import ShardSet
from shards.stream import Stream

ROOT = Path(__file__).parents[2]
WINDOW, BATCH = 2, 3
FIELDS = ("images", "parts", "fgrank", "class_ids", "indices", "epochs")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Iterator[ShardSet]:
    """Ten shards of six samples, of nearly one size, read where they lie."""
    folder = tmp_path_factory.mktemp("original") / "set"
    with ShardSet.open(write_set(folder, count=60, size=32, samples_per_shard=6)) as shards:
        yield shards


@pytest.fixture(params=["folder", "s3"])
def source(request, original) -> str:
    """The set in a folder, or in a bucket."""
    if request.param == "folder":
        return str(original.path)
    return upload(original.path, request.getfixturevalue("s3"))


def upload(folder: Path, store: fs.FileSystem) -> str:
    fs.copy_files(str(folder), "images/set", source_filesystem=fs.LocalFileSystem(), destination_filesystem=store)
    return "s3://images/set"


def two_windows(shards: ShardSet) -> int:
    """The smallest budget: the largest shards of two windows."""
    return sum(sorted(shard["bytes"] for shard in shards.info["shards"])[-2 * WINDOW :])


def same(one: Iterator, other: Iterator, count: int) -> bool:
    """Whether two streams give the same `count` batches, bit for bit."""
    try:
        pairs = list(islice(zip(one, other, strict=True), count))
    finally:
        one.close()
        other.close()
    return len(pairs) == count and all(
        np.array_equal(getattr(first, name), getattr(second, name)) for first, second in pairs for name in FIELDS
    )


def stream(shards: ShardSet, **options) -> Iterator:
    return iter(Stream(shards, **{"batch_size": BATCH, "seed": 0, "window": WINDOW, "flip": True} | options))


@pytest.mark.parametrize("options", [{}, {"threads": 4, "prefetch": 4}, {"position": 77}, {"crop_scale": 0.4}], ids=str)
def test_a_cached_stream_is_the_uncached_one_bit_for_bit_in_two_windows_of_room(options, source, original, tmp_path):
    """One and a half epochs, so that shards are copied, let go, and copied again. What is decoded far ahead spans more
    windows, and needs room for them."""
    room = two_windows(original) * (2 if "prefetch" in options else 1)
    with ShardSet.open(source, cache=tmp_path, cache_bytes=room) as cached:
        assert same(stream(cached, **options), stream(original, **options), 30)


class Watch(threading.Thread):
    """Looks at a folder as often as it can: the most that whole copies took, and copies with those under way."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.most_whole, self.most, self.looks, self.watching = folder, 0, 0, 0, True

    def run(self) -> None:
        while self.watching:
            sizes: dict[str, int] = {}
            for entry in os.scandir(self.folder):
                try:
                    sizes[entry.name] = entry.stat().st_size
                except FileNotFoundError:
                    continue
            whole = sum(size for name, size in sizes.items() if name.endswith(".tar"))
            self.most_whole, self.most = max(self.most_whole, whole), max(self.most, sum(sizes.values()))
            self.looks += 1

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watching = False
        self.join()


@pytest.mark.parametrize(
    ("pause", "threads"), [(0.0, 1), (0.0, 4), (0.01, 2)], ids=["reading first", "four readers first", "copying first"]
)
def test_the_copies_never_take_more_than_they_may(pause, threads, source, original, tmp_path):
    """Without a pause readers come before the copies do, and copy for themselves. A look at the folder is no single
    moment, so a shard that is renamed or deleted meanwhile may count twice: one shard is the tolerance."""
    budget = two_windows(original)
    tolerance = max(shard["bytes"] for shard in original.info["shards"])
    with (
        ShardSet.open(source, cache=tmp_path, cache_bytes=budget) as cached,
        Watch(cached.path / "shards") as watch,
    ):
        for _ in range(2):  # the second stream begins where the first began, with its last copies there
            batches = stream(cached, threads=threads)
            for _ in islice(batches, 30):
                time.sleep(pause)
            batches.close()

    assert watch.looks > 20
    assert 0 < watch.most_whole <= budget + tolerance
    assert watch.most <= budget + tolerance
    assert sum(file.stat().st_size for file in cached.path.glob("shards/*.tar")) <= budget


def test_shards_of_past_windows_are_deleted_and_take_no_room_of_the_disk(original, tmp_path):
    """An open file keeps its room after it is deleted: none stays open."""
    with ShardSet.open(original.path, cache=tmp_path, cache_bytes=two_windows(original)) as cached:
        batches = iter(Stream(cached, batch_size=BATCH, seed=0, window=WINDOW, prefetch=0))
        windows = Epochs(original.shard_sizes, seed=0, window=WINDOW).windows(0)
        first, second, third, fourth = ({f"{n:06d}.tar" for n in numbers} for _, numbers in islice(windows, 4))
        list(islice(batches, 1))
        wait_until(lambda: copies(cached) == first | second)
        list(islice(batches, 9))  # into the third window
        wait_until(lambda: copies(cached) == third | fourth)
        list(islice(batches, 1))
        kept = open_files(tmp_path)
        batches.close()

    assert kept
    assert not [name for name in kept if name.endswith("(deleted)")]


def test_reading_in_order_stays_within_the_size_too(original, tmp_path):
    """Nothing says what comes next, so copies are made as they are needed."""
    budget = two_windows(original)
    with (
        ShardSet.open(original.path, cache=tmp_path, cache_bytes=budget) as cached,
        Watch(cached.path / "shards") as watch,
    ):
        read = [index for batch in in_order(cached, batch_size=4) for index in batch.indices.tolist()]
        kept = open_files(tmp_path)

    assert read == list(range(60))
    assert 0 < watch.most <= budget + max(shard["bytes"] for shard in original.info["shards"])
    assert len(kept) <= 2 * WINDOW + 2  # each of two readers may hold one that has just been deleted


def copies(shards: ShardSet) -> set[str]:
    return {file.name for file in shards.path.glob("shards/*.tar")}


def wait_until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_budget_below_two_windows_is_refused_with_the_size_it_needs(original, tmp_path):
    needed = two_windows(original)
    with ShardSet.open(original.path, cache=tmp_path, cache_bytes=needed - 1) as cached:
        batches = stream(cached)

        with pytest.raises(ValueError, match=rf"needs {needed / 1e9:.2f} GB .* raise --cache-gb, or choose a smaller"):
            next(batches)

    with ShardSet.open(original.path, cache=tmp_path, cache_bytes=needed) as cached:
        assert same(stream(cached), stream(original), 1)


def test_without_windows_all_shards_must_fit(original, tmp_path):
    with ShardSet.open(original.path, cache=tmp_path, cache_bytes=two_windows(original)) as cached:
        batches = stream(cached, window=0)

        with pytest.raises(ValueError, match="shuffle windows of shards, with --window 8"):
            next(batches)


def test_a_remote_set_without_a_cache_is_a_sentence():
    with pytest.raises(ValueError, match=r"^s3://images/set is remote: name with --cache a folder on a local disk"):
        ShardSet.open("s3://images/set")


def test_no_set_at_a_place_is_a_sentence(s3, tmp_path):
    for nowhere in ("s3://images/nowhere", "s3://no-such-bucket/set", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=rf"no whole shard set at {nowhere}: dataset\.json is missing"):
            ShardSet.open(nowhere, cache=tmp_path / "cache")


def test_labels_lie_on_a_local_disk(original, tmp_path):
    with pytest.raises(ValueError, match=r"the labels s3://images/labels are remote; copy"):
        ShardSet.open(original.path, cache=tmp_path, labels="s3://images/labels")


@pytest.fixture
def mine(original, tmp_path) -> Path:
    """A set of one's own, to be harmed."""
    return Path(shutil.copytree(original.path, tmp_path / "mine"))


def harmed(tar: Path, at: int = 700) -> None:
    data = bytearray(tar.read_bytes())
    data[at] ^= 1
    tar.write_bytes(data)


@pytest.mark.parametrize("at", [700, -700], ids=["an image", "the padding at the end"])
def test_s8_a_damaged_remote_shard_is_named_and_not_kept(at, mine, s3, tmp_path):
    """Its sha256 tells even of bytes that no sample needs."""
    harmed(mine / "shards/000004.tar", at)
    with ShardSet.open(upload(mine, s3), cache=tmp_path / "cache") as cached:
        with pytest.raises(ShardError, match=r"s3://images/set/shards/000004\.tar is damaged: its sha256"):
            list(islice(stream(cached), 40))

        assert "000004.tar" not in copies(cached)
        assert not list(cached.path.glob("shards/.*"))


def test_s8_a_lost_remote_shard_is_named(mine, s3, tmp_path):
    (mine / "shards/000004.tar").unlink()

    with (
        ShardSet.open(upload(mine, s3), cache=tmp_path / "cache") as cached,
        pytest.raises(ShardError, match=r"s3://images/set/shards/000004\.tar is missing; upload it again"),
    ):
        list(islice(stream(cached), 40))


def test_s8_an_index_that_is_not_the_one_named_is_refused(mine, s3, tmp_path):
    shutil.copy(mine / "shards/000000.parquet", mine / "index.parquet")

    with pytest.raises(ShardError, match=r"index\.parquet is missing or not the one dataset\.json names"):
        ShardSet.open(upload(mine, s3), cache=tmp_path / "cache")


def test_after_the_store_has_repaired_the_same_set_streams_on(mine, original, tmp_path):
    """What failed once is asked for again by the next stream."""
    whole = (mine / "shards/000004.tar").read_bytes()
    harmed(mine / "shards/000004.tar")
    with ShardSet.open(mine, cache=tmp_path / "cache") as cached:
        with pytest.raises(ShardError, match="sha256"):
            list(islice(stream(cached), 40))
        (mine / "shards/000004.tar").write_bytes(whole)

        assert same(stream(cached), stream(original), 30)


def test_a_set_built_anew_at_the_same_place_is_copied_anew(original, tmp_path):
    """Other images, other checksums, and shards of the same names and sizes: old copies must not stand in."""
    place, cache = tmp_path / "place", tmp_path / "cache"
    shutil.copytree(original.path, place)
    with ShardSet.open(place, cache=cache) as cached:
        list(in_order(cached, batch_size=20))
    shutil.rmtree(place)
    write_set(place, count=60, size=32, samples_per_shard=6, seed=1)

    with ShardSet.open(place) as plain, ShardSet.open(place, cache=cache) as cached:
        alike = [
            one["bytes"] == other["bytes"]
            for one, other in zip(plain.info["shards"], original.info["shards"], strict=True)
        ]
        assert any(alike)
        assert plain.fingerprint != original.fingerprint
        assert same(stream(cached), stream(plain), 20)


def test_copies_that_vanish_under_the_reader_are_copied_again(original, tmp_path):
    """Another rank may make room at any moment: nothing depends on the copies being there."""
    done = threading.Event()

    def sweep(folder: Path) -> None:
        while not done.is_set():
            for copy in folder.glob("*.tar"):
                copy.unlink(missing_ok=True)
            time.sleep(0.001)

    with ShardSet.open(original.path, cache=tmp_path) as cached:
        other = threading.Thread(target=sweep, args=(cached.path / "shards",))
        other.start()
        try:
            assert same(stream(cached, threads=3), stream(original), 30)
        finally:
            done.set()
            other.join()


KILLED = """
import sys
from pathlib import Path
from shards import cache
from shards.shard_set import ShardSet

cache.PIECE = 512
with ShardSet.open(sys.argv[1], cache=sys.argv[2]) as shards:
    print("begun", flush=True)
    shards.read(0)
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_g3_a_kill_while_a_shard_is_copied_leaves_nothing_that_is_taken_for_whole(mine, original, tmp_path):
    """The store is a pipe here, so that the kill comes in the middle of the copy for certain."""
    tar, cache = mine / "shards/000000.tar", tmp_path / "cache"
    whole = tar.read_bytes()
    tar.unlink()
    os.mkfifo(tar)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(mine), str(cache)], env=environment())
    with open(tar, "wb", buffering=0) as pipe:
        pipe.write(whole[: len(whole) // 2])
        wait_until(lambda: any(part.stat().st_size for part in cache.glob("*/shards/.*.part")))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not list(cache.glob("*/shards/*.tar"))
    tar.unlink()
    tar.write_bytes(whole)

    with ShardSet.open(mine, cache=cache, cache_bytes=two_windows(original)) as cached:
        assert not list(cache.glob("*/shards/.*.part"))
        assert same(stream(cached), stream(original), 25)
        for copy in cached.path.glob("shards/*.tar"):
            assert sha256_file(copy) == sha256_file(original.path / "shards" / copy.name)


RANK = """
import hashlib, json, sys
from itertools import islice
from shards.shard_set import ShardSet
from shards.stream import Stream

source, cache, budget, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with ShardSet.open(source, cache=cache, cache_bytes=budget) as shards:
    stream = Stream(shards, batch_size=6, seed=0, window=2, rank=rank, world_size=2, prefetch=1)
    for batch in islice(stream, 25):
        digest = hashlib.sha256(batch.images.tobytes() + batch.parts.tobytes() + batch.fgrank.tobytes())
        print(json.dumps([batch.position, batch.indices.tolist(), digest.hexdigest()]), flush=True)
"""


@pytest.mark.slow
def test_two_ranks_share_one_stage(original, tmp_path):
    budget = two_windows(original)
    command = [sys.executable, "-c", RANK, str(original.path), str(tmp_path), str(budget)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment(), stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]

    told = [rank.communicate(timeout=120)[0] for rank in ranks]

    assert [rank.returncode for rank in ranks] == [0, 0]
    for rank in range(2):
        lines = [json.loads(line) for line in told[rank].splitlines()]
        alone = Stream(original, batch_size=6, seed=0, window=2, rank=rank, world_size=2)
        assert [line[:2] for line in lines] == [[b.position, b.indices.tolist()] for b in islice(alone, 25)]
        assert len({line[2] for line in lines}) == 25
    (folder,) = tmp_path.glob("*/shards")
    assert not list(folder.glob(".*.part"))
    assert all(sha256_file(copy) == sha256_file(original.path / "shards" / copy.name) for copy in folder.glob("*.tar"))


def test_a_stage_leaves_what_it_copies_from_as_it_was(original, tmp_path):
    before = {file: (file.stat().st_mtime_ns, sha256_file(file)) for file in original.path.rglob("*.*")}

    with ShardSet.open(original.path, cache=tmp_path) as cached:
        list(islice(stream(cached), 20))

    assert {file: (file.stat().st_mtime_ns, sha256_file(file)) for file in original.path.rglob("*.*")} == before
    assert read_json(cached.path / "dataset.json")["fingerprint"] == original.fingerprint
