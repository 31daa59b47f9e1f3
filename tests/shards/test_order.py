"""Order and random numbers are pure functions of their key."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import Epochs, permutation
from shards.rng import FLIP, MASK, uniform

counts = st.integers(1, 300)


@settings(deadline=None)
@given(count=counts, seed=st.integers(0, 5), epoch=st.integers(0, 5))
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


@settings(deadline=None)
@given(count=counts, batch_size=st.integers(1, 400), seed=st.integers(0, 9))
def test_every_index_comes_once_an_epoch_in_batches_of_any_size(count, batch_size, seed):
    epochs = Epochs(np.array([count]), seed=seed)
    starts = range(0, 3 * count, batch_size)

    batches = [epochs.at(np.arange(start, start + batch_size)) for start in starts]

    indices, numbers = (np.concatenate(column)[: 3 * count].reshape(3, count) for column in zip(*batches, strict=True))
    assert np.array_equal(np.sort(indices), np.tile(np.arange(count), (3, 1)))
    assert np.array_equal(numbers, np.repeat([[0], [1], [2]], count, axis=1))


@settings(deadline=None)
@given(count=counts, local=st.integers(1, 40), world_size=st.integers(1, 8), step=st.integers(0, 10**9))
def test_the_blocks_of_the_ranks_are_the_batch_of_one(count, local, world_size, step):
    first = step * local * world_size
    alone = Epochs(np.array([count]), seed=3).at(np.arange(first, first + local * world_size))

    ranks = [
        Epochs(np.array([count]), seed=3).at(np.arange(first + rank * local, first + (rank + 1) * local))
        for rank in range(world_size)
    ]

    for mine, ours in zip(alone, zip(*ranks, strict=True), strict=True):
        assert np.array_equal(mine, np.concatenate(ours))


@settings(deadline=None)
@given(count=counts, positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_the_past_does_not_matter(count, positions):
    used, places = Epochs(np.array([count]), seed=0), np.arange(7)

    for position in positions:
        fresh = Epochs(np.array([count]), seed=0)
        assert np.array_equal(used.at(places + position), fresh.at(places + position))


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {tuple(permutation(50, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}

    assert len(orders) == 16


@settings(deadline=None)
@given(rows=st.permutations(range(12)))
def test_draws_belong_to_samples_not_to_places_in_a_batch(rows):
    epochs, indices = np.arange(12) // 5, np.arange(12) * 7
    whole = uniform(1, epochs, indices, MASK, 3)

    assert np.array_equal(uniform(1, epochs[rows], indices[rows], MASK, 3), whole[rows])
