"""S1 to S5: every sample once, in an order of seed and epoch alone, from any position, on any number of ranks."""

import io
import threading
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from shards.batches import in_order
from shards.decode import decode_jpeg_into
from shards.errors import ShardError
from shards.stream import Stream


def indices(stream: Stream, batches: int) -> list[int]:
    iterator = iter(stream)
    found = [int(index) for batch in islice(iterator, batches) for index in batch.indices]
    iterator.close()
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 16, 40, 64])
def test_each_sample_comes_once_an_epoch_whatever_the_batch(batch_size, make_shards):
    shards = make_shards()

    seen = indices(Stream(shards, batch_size=batch_size, seed=1), -(-120 // batch_size))[:120]

    for epoch in range(3):
        assert sorted(seen[40 * epoch : 40 * (epoch + 1)]) == list(range(40))
    assert seen[:40] != seen[40:80]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_batch_of_one(world_size, make_shards):
    shards = make_shards()
    alone = indices(Stream(shards, batch_size=12, seed=0), 5)

    ranks = [
        indices(Stream(shards, batch_size=12, seed=0, rank=r, world_size=world_size), 5) for r in range(world_size)
    ]

    local = 12 // world_size
    joined = [i for step in range(5) for rank in ranks for i in rank[step * local : (step + 1) * local]]
    assert joined == alone


@pytest.mark.parametrize("position", [12, 36, 48, 4800])
def test_starting_at_a_position_gives_what_followed_it(position, make_shards):
    shards = make_shards()
    steps = position // 12
    whole = iter(Stream(shards, batch_size=12, seed=0, position=(steps - 1) * 12))
    next(whole)

    resumed = iter(Stream(shards, batch_size=12, seed=0, position=position))

    for _ in range(3):
        one, other = next(whole), next(resumed)
        assert one.position == other.position
        for name in ("images", "parts", "fgrank", "class_ids", "indices", "epochs"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    whole.close()
    resumed.close()


def test_thread_count_changes_nothing(make_shards):
    shards = make_shards()
    iterators = [iter(Stream(shards, batch_size=10, seed=0, threads=threads)) for threads in (1, 3)]

    for one, other in islice(zip(*iterators, strict=True), 6):
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.parts, other.parts)
    for iterator in iterators:
        iterator.close()


def test_no_thread_is_left_behind(make_shards):
    before = threading.active_count()
    iterator = iter(Stream(make_shards(), batch_size=8, seed=0))
    next(iterator)

    iterator.close()

    assert threading.active_count() == before


def test_leaving_in_order_early_leaves_no_thread(make_shards):
    before = threading.active_count()
    iterator = in_order(make_shards(), batch_size=8)
    next(iterator)

    iterator.close()

    assert threading.active_count() == before


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_decoding_ahead_changes_nothing(prefetch, make_shards):
    shards = make_shards()

    ahead = indices(Stream(shards, batch_size=12, seed=0, prefetch=prefetch), 7)

    assert ahead == indices(Stream(shards, batch_size=12, seed=0), 7)


def test_a_batch_holds_what_the_shards_hold(make_shards):
    shards = make_shards()
    iterator = iter(Stream(shards, batch_size=30, seed=0, position=60))
    batch = next(iterator)
    iterator.close()

    assert (batch.position, batch.epochs.tolist()) == (60, [1] * 20 + [2] * 10)
    for row, index in enumerate(batch.indices):
        sample = shards.read(int(index))
        assert np.array_equal(batch.parts[row], sample.parts)
        assert np.array_equal(batch.fgrank[row], sample.fgrank)
        assert batch.class_ids[row] == sample.class_id
        with Image.open(io.BytesIO(sample.jpeg)) as image:
            assert np.array_equal(batch.images[row], np.asarray(image))


@pytest.mark.parametrize("batch_size", [0, -4])
def test_an_empty_batch_is_refused(batch_size, make_shards):
    with pytest.raises(ValueError, match="cannot be shared"):
        Stream(make_shards(), batch_size=batch_size, seed=0)


def test_a_batch_that_ranks_cannot_share_is_refused(make_shards):
    with pytest.raises(ValueError, match="a batch of 10 cannot be shared by 4 ranks"):
        Stream(make_shards(), batch_size=10, seed=0, world_size=4)


def test_damage_stops_the_stream_and_is_named(make_shards):
    shards = make_shards()
    tar = shards.path / "shards/000002.tar"
    tar.write_bytes(tar.read_bytes()[:3000])

    with pytest.raises(ShardError, match=r"000002\.tar"):
        indices(Stream(shards, batch_size=8, seed=0), 5)


def test_a_lost_shard_stops_the_stream_and_is_named(make_shards):
    shards = make_shards()
    (shards.path / "shards/000001.tar").unlink()

    with pytest.raises(ShardError, match=r"000001\.tar is missing"):
        list(in_order(shards, batch_size=8))


def test_a_picture_of_the_wrong_size_stops_the_stream_and_is_named(make_shards):
    shards = make_shards(size=32)
    shards.size = 16

    with pytest.raises(ShardError, match=r"000000\.tar: jpg of 0000000\d at byte \d+ .* expected 16x16"):
        next(in_order(shards, batch_size=8))


def test_in_order_gives_every_sample_once(make_shards):
    batches = list(in_order(make_shards(), batch_size=16))

    assert np.concatenate([batch.indices for batch in batches]).tolist() == list(range(40))
    assert len(batches[-1].images) == 8


def test_a_picture_of_another_size_is_refused(make_shards):
    jpeg = make_shards(size=32).read(0).jpeg

    with pytest.raises(ValueError, match="is 32x32, expected 16x16"):
        decode_jpeg_into(jpeg, np.empty((16, 16, 3), np.uint8))
