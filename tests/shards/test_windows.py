"""S1, S2: order v1. Shards are read a window at a time, each sample still comes once an epoch, and it never changes."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.crops import sample_boxes, sample_flips
from shards.order import Epochs, permutation
from shards.rng import CROP, FLIP, MASK, ORDER, PART_ORDER, SHARDS, VIEW, uniform

shard_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any).map(np.array)
windows = st.integers(1, 14)
seeds = st.integers(0, 9)


def owners(sizes: np.ndarray) -> np.ndarray:
    """The shard of each index."""
    return np.repeat(np.arange(len(sizes)), sizes)


@settings(deadline=None)
@given(sizes=shard_sizes, window=windows, batch_size=st.integers(1, 400), seed=seeds)
def test_s1_each_sample_comes_once_an_epoch_in_windows_and_batches_of_any_size(sizes, window, batch_size, seed):
    epochs, count = Epochs(sizes, seed=seed, window=window), int(sizes.sum())

    batches = [epochs.at(np.arange(start, start + batch_size)) for start in range(0, 3 * count, batch_size)]

    indices, numbers = (np.concatenate(column)[: 3 * count].reshape(3, count) for column in zip(*batches, strict=True))
    assert np.array_equal(np.sort(indices), np.tile(np.arange(count), (3, 1)))
    assert np.array_equal(numbers, np.repeat([[0], [1], [2]], count, axis=1))


@settings(deadline=None)
@given(sizes=shard_sizes, window=windows, seed=seeds)
def test_s1_a_window_is_read_from_its_own_shards_and_all_of_them(sizes, window, seed):
    epochs, count, owner = Epochs(sizes, seed=seed, window=window), int(sizes.sum()), owners(sizes)

    begin, read = 0, []
    for end, together in epochs.windows(0):
        if begin >= count:
            break
        indices, _ = epochs.at(np.arange(begin, end))
        assert set(owner[indices]) == {shard for shard in together.tolist() if sizes[shard]}
        assert len(indices) == sizes[together].sum()
        read.append(together.tolist())
        begin = end

    assert begin == count
    assert all(len(together) == window for together in read[:-1])
    numbers = [shard for together in read for shard in together]
    assert len(set(numbers)) == len(numbers)
    assert {shard for shard in range(len(sizes)) if sizes[shard]} <= set(numbers)


@settings(deadline=None)
@given(sizes=shard_sizes, window=st.integers(0, 14), seed=seeds, share=st.floats(0, 3))
def test_windows_names_the_shards_that_are_read_from_any_position_on(sizes, window, seed, share):
    epochs, owner, position = Epochs(sizes, seed=seed, window=window), owners(sizes), int(share * sizes.sum())

    named = [(end, together.tolist()) for end, together in islice(epochs.windows(position), 5)]

    from_the_start = ((end, together.tolist()) for end, together in epochs.windows(0))
    assert named == list(islice((one for one in from_the_start if one[0] > position), 5))
    for begin, (end, together) in zip([position, *(end for end, _ in named)], named, strict=False):
        assert set(owner[epochs.at(np.arange(begin, end))[0]]) <= set(together)


@settings(deadline=None)
@given(sizes=shard_sizes, window=windows, seed=seeds, positions=st.lists(st.integers(0, 10**5), min_size=1, max_size=5))
def test_s2_the_past_does_not_matter_in_windows_either(sizes, window, seed, positions):
    used, places = Epochs(sizes, seed=seed, window=window), np.arange(9)

    for position in positions:
        fresh = Epochs(sizes, seed=seed, window=window)
        assert np.array_equal(used.at(places + position), fresh.at(places + position))


def test_s2_the_sample_order_within_a_window_is_the_epoch_order_of_its_samples():
    """A window changes when a sample comes, not the shuffle it is taken from."""
    sizes = np.array([7, 3, 9, 1, 5])
    epochs, whole = Epochs(sizes, seed=4, window=2), permutation(25, seed=4, epoch=0)

    begin = 0
    for end, together in islice(epochs.windows(0), 3):
        inside = np.isin(owners(sizes)[whole], together)
        assert np.array_equal(epochs.at(np.arange(begin, end))[0], whole[inside])
        begin = end


def test_s2_windows_differ_between_epochs_and_seeds():
    sizes = np.full(12, 10)
    orders = set()

    for seed in range(4):
        begun = list(islice(Epochs(sizes, seed=seed, window=3).windows(0), 16))
        for epoch in range(4):
            orders.add(tuple(shard for _, together in begun[4 * epoch : 4 * epoch + 4] for shard in together.tolist()))

    assert len(orders) == 16


def test_a_window_of_all_shards_shuffles_all_samples():
    sizes = np.array([40, 40, 40])

    one_window, whole = (Epochs(sizes, seed=0, window=window).at(np.arange(240)) for window in (3, 0))

    assert np.array_equal(one_window, whole)


def test_the_order_is_named_for_the_state():
    assert Epochs(np.array([4]), seed=0).name == "global/v1"
    assert Epochs(np.array([4]), seed=0, window=8).name == "window:8/v1"


# Order v1 is written down here, never to change: a run that one release began, the next goes on with.


@pytest.mark.parametrize(
    ("seed", "epoch", "first"),
    [
        (0, 0, [448, 120, 981, 671, 926, 378, 283, 843, 597, 302]),
        (1, 3, [830, 814, 336, 456, 46, 304, 730, 9, 36, 139]),
    ],
)
def test_order_v1_an_epoch_of_a_thousand_begins_as_ever(seed, epoch, first):
    assert permutation(1000, seed=seed, epoch=epoch)[:10].tolist() == first


def test_order_v1_windows_of_two_of_ten_shards_begin_as_ever():
    epochs = Epochs(np.array([100] * 10), seed=0, window=2)

    indices, numbers = epochs.at(np.arange(10))

    assert indices.tolist() == [448, 981, 926, 434, 473, 403, 979, 906, 944, 415]
    assert numbers.tolist() == [0] * 10
    assert [(end, together.tolist()) for end, together in islice(epochs.windows(0), 5)] == [
        (200, [4, 9]),
        (400, [5, 2]),
        (600, [7, 0]),
        (800, [8, 6]),
        (1000, [3, 1]),
    ]


@pytest.mark.parametrize(
    ("purpose", "first", "later"),
    [
        (ORDER, [0.7351873517036438, 0.11386501789093018], [0.6626200675964355, 0.5480853915214539]),
        (FLIP, [0.7241505980491638, 0.3246820569038391], [0.3439180850982666, 0.21936142444610596]),
        (CROP, [0.4003549814224243, 0.14392590522766113], [0.6042512655258179, 0.4508419632911682]),
        (MASK, [0.06089746952056885, 0.23271209001541138], [0.27655166387557983, 0.45390135049819946]),
        (PART_ORDER, [0.5410276055335999, 0.984921395778656], [0.10174691677093506, 0.9132023453712463]),
        (VIEW, [0.20136356353759766, 0.04862922430038452], [0.586596667766571, 0.7917782068252563]),
        (SHARDS, [0.595522403717041, 0.5917696356773376], [0.4485056400299072, 0.7992232441902161]),
    ],
)
def test_order_v1_the_draws_of_every_purpose_begin_as_ever(purpose, first, later):
    """Each is a multiple of 2^-24, so a decimal names it exactly."""
    draws = uniform(0, np.array([0, 2]), np.array([0, 7]), purpose, 2)

    assert draws.tolist() == [first, later]


def test_order_v1_flips_and_boxes_begin_as_ever():
    epochs, indices = np.zeros(8, np.int64), np.arange(8)

    assert sample_flips(0, epochs, indices).tolist() == [False, False, True, False, True, False, True, False]
    assert sample_boxes(0, epochs[:4], indices[:4], size=224, scale=0.2).tolist() == [
        [49, 11, 146, 179],
        [41, 9, 157, 193],
        [95, 54, 122, 140],
        [85, 90, 133, 132],
    ]
