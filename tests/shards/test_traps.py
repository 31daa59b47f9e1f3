"""Traps that stock webdataset lets people walk into silently, each sprung here, and our reader beside it."""

import gc
import io
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset

from shards.errors import SampleError, ShardError
from shards.shard_set import ShardSet
from shards.stream import Stream
from shards.verify import verify
from shards.writer import shard_paths


@contextmanager
def stock() -> Iterator[None]:
    """webdataset leaves its tars to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def tars(shards: ShardSet) -> list[str]:
    return [str(path) for path in sorted((shards.path / "shards").glob("*.tar"))]


def epoch_of(shards: ShardSet, epoch: int, *, batch_size: int = 8, seed: int = 0) -> list[int]:
    stream = iter(Stream(shards, batch_size=batch_size, seed=seed, position=epoch * len(shards)))
    found = [int(i) for batch in islice(stream, -(-len(shards) // batch_size)) for i in batch.indices]
    stream.close()
    return found[: len(shards)]


def test_a_fixed_seed_does_not_repeat_the_order_of_shards_every_epoch(make_shards):
    shards = make_shards(samples_per_shard=4)
    with stock():
        pipeline = webdataset.WebDataset(tars(shards), shardshuffle=10, seed=7)
        theirs = [[sample["__url__"] for sample in pipeline] for _ in range(2)]

    ours = [epoch_of(shards, epoch, seed=7) for epoch in range(2)]

    assert theirs[0] == theirs[1]
    assert ours[0] != ours[1]
    assert sorted(ours[0]) == sorted(ours[1]) == list(range(40))


def test_a_tar_cut_between_two_members_is_not_read_as_a_whole_one(make_shards):
    shards = make_shards(classes=0)
    tar = Path(tars(shards)[1])
    data = tar.read_bytes()
    tar.write_bytes(data[: shards.row(20).begin + shards.row(20).parts - 512])
    with stock():
        theirs = list(webdataset.WebDataset([str(tar)], shardshuffle=False))

    with pytest.raises(ShardError, match=r"000001\.tar has \d+ bytes, expected"):
        Stream(shards, batch_size=8, seed=0)

    assert len(theirs) == 5
    assert "parts.npy" not in theirs[-1]
    assert [fault.shard for fault in verify(shards.path)] == ["000001.tar"]


def test_garbage_inside_an_image_is_not_trained_on(make_shards):
    shards = make_shards(count=8, size=128, classes=0)
    row, tar = shards.row(3), shard_paths(shards.path, 0)[0]
    data = bytearray(tar.read_bytes())
    middle = row.begin + row.jpg_size // 2
    data[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    tar.write_bytes(data)
    with stock():
        theirs = list(webdataset.WebDataset(tars(shards), shardshuffle=False))

    with pytest.raises(SampleError, match=rf"000000\.tar: jpg of 00000003 at byte {row.begin} .* checksum differs"):
        epoch_of(shards, 0)

    assert len(theirs) == 8


def test_a_batch_is_drawn_from_every_shard_not_from_a_buffer(make_shards):
    shards = make_shards(count=400, size=16, classes=0, samples_per_shard=100)
    with stock():
        pipeline = webdataset.WebDataset(tars(shards), shardshuffle=False).shuffle(40)
        theirs = {sample["__url__"] for sample in islice(pipeline, 32)}

    ours = [np.bincount(np.array(epoch_of(shards, 0, batch_size=32)[first : first + 32]) // 100, minlength=4)
            for first in range(0, 384, 32)]  # fmt: skip

    assert len(theirs) <= 2
    assert all((counts > 0).all() for counts in ours)


def test_the_clock_is_in_no_byte(make_shards):
    buffers = []
    for _ in range(2):
        buffers.append(io.BytesIO())
        with webdataset.TarWriter(buffers[-1]) as writer:
            writer.write({"__key__": "0", "jpg": b"x"})
        time.sleep(1.1)
    ours = [Path(tars(make_shards(name, count=4))[0]).read_bytes() for name in ("one", "two")]

    assert buffers[0].getvalue() != buffers[1].getvalue()
    assert ours[0] == ours[1]
    with tarfile.open(fileobj=io.BytesIO(ours[0])) as tar:
        assert {member.mtime for member in tar} == {0}


def test_ranks_never_run_out_of_batches_before_each_other(make_shards: Callable[..., ShardSet]):
    """S9. Three tars between two ranks: one gets two, the other one, and DDP waits for ever."""
    shards = make_shards(samples_per_shard=16)
    with stock():
        theirs = [len(list(webdataset.WebDataset(tars(shards)[rank::2], shardshuffle=False))) for rank in range(2)]

    ours = [iter(Stream(shards, batch_size=6, seed=0, rank=rank, world_size=2)) for rank in range(2)]
    sizes = [[len(batch.indices) for batch in islice(stream, 14)] for stream in ours]
    for stream in ours:
        stream.close()

    assert theirs == [24, 16]
    assert sizes[0] == sizes[1] == [3] * 14


def test_seed_one_is_not_seed_zero_shifted_by_a_sample(make_shards):
    """grain keys its draws by seed + index."""
    from shards.rng import FLIP, uniform

    indices, epochs = np.arange(200), np.zeros(200, np.int64)
    zero, one = (uniform(seed, epochs, indices, FLIP, 1)[:, 0] for seed in (0, 1))

    assert not np.isin(one[:-1], zero[1:]).any()
