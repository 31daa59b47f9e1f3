"""S1 to S5: every sample once, in an order of seed and epoch alone, from any position, on any number of ranks."""

import threading
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.order import FLIP, MASK, permutation, uniform
from shards.stream import Stream, decode_jpeg_into, in_order


def indices(stream: Stream, batches: int) -> list[int]:
    iterator = iter(stream)
    found = [int(index) for batch in islice(iterator, batches) for index in batch.indices]
    iterator.close()
    return found


@given(count=st.integers(1, 300), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_order_is_a_permutation(count, seed, epoch):
    order = permutation(count, seed=seed, epoch=epoch)

    assert np.array_equal(np.sort(order), np.arange(count))


def test_the_order_is_the_one_of_every_release():
    assert permutation(8, seed=0, epoch=0).tolist() == GOLDEN_ORDER
    assert uniform(0, np.array([0, 1]), np.array([5, 5]), FLIP, 2).ravel().tolist() == pytest.approx(GOLDEN_DRAWS)


GOLDEN_ORDER = [0, 1, 5, 4, 6, 3, 2, 7]
GOLDEN_DRAWS = [0.7394862174987793, 0.6323685646057129, 0.7738612294197083, 0.3303515315055847]


def test_draws_are_uniform_and_depend_on_their_whole_key():
    epochs, places = np.zeros(4000, np.int64), np.arange(4000)

    draws = uniform(3, epochs, places, MASK, 8)

    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.05
    for other in (
        uniform(4, epochs, places, MASK, 8),
        uniform(3, epochs + 1, places, MASK, 8),
        uniform(3, epochs, places, FLIP, 8),
    ):
        assert (draws == other).mean() < 0.001
    assert np.array_equal(uniform(3, epochs[:5], places[10:15], MASK, 8), draws[10:15])


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


def test_a_batch_that_ranks_cannot_share_is_refused(make_shards):
    with pytest.raises(ValueError, match="a batch of 10 cannot be shared by 4 ranks"):
        Stream(make_shards(), batch_size=10, seed=0, world_size=4)


def test_damage_stops_the_stream_and_is_named(make_shards):
    shards = make_shards()
    tar = shards.path / "shards/000002.tar"
    tar.write_bytes(tar.read_bytes()[:3000])

    with pytest.raises(ShardError, match=r"000002\.tar"):
        indices(Stream(shards, batch_size=8, seed=0), 5)


def test_in_order_gives_every_sample_once(make_shards):
    batches = list(in_order(make_shards(), batch_size=16))

    assert np.concatenate([batch.indices for batch in batches]).tolist() == list(range(40))
    assert len(batches[-1].images) == 8


def test_a_picture_of_another_size_is_refused(make_shards):
    jpeg = make_shards(size=32).read(0).jpeg

    with pytest.raises(ValueError, match="is 32x32, expected 16x16"):
        decode_jpeg_into(jpeg, np.empty((16, 16, 3), np.uint8))
