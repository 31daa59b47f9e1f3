"""Our shards through stock webdataset give what our own reader and stream give for the same keys."""

import gc
import warnings
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest

from shards.batches import in_order
from shards.errors import ShardError
from shards.stream import Stream
from shards.webdataset import webdataset_pipeline


@pytest.fixture(autouse=True)
def tars_left_open() -> Iterator[None]:
    """webdataset leaves its tars to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def keys(pipeline) -> list[str]:
    return [sample["__key__"] for sample in pipeline]


def same(sample: dict, batch, row: int) -> bool:
    """Whether a stock sample is a row of one of our batches, class and pixels included."""
    pairs = (("jpg", batch.images), ("parts.npy", batch.parts), ("fgrank.npy", batch.fgrank))
    return sample.get("cls", -1) == batch.class_ids[row] and all(
        sample[name].dtype == ours.dtype and np.array_equal(sample[name], ours[row]) for name, ours in pairs
    )


@pytest.mark.parametrize("classes", [3, 0])
def test_in_stored_order_every_sample_is_the_one_of_our_reader(classes, make_shards):
    shards = make_shards(count=40, classes=classes)

    theirs = list(webdataset_pipeline(shards.path, shuffle=0))

    (ours,) = in_order(shards, batch_size=40)
    assert [sample["__key__"] for sample in theirs] == shards.keys
    assert all(same(sample, ours, row) for row, sample in enumerate(theirs))
    assert all(("cls" in sample) == (classes > 0) for sample in theirs)


def test_shuffled_it_gives_each_sample_of_our_stream_once_in_an_order_of_the_seed(make_shards):
    shards = make_shards(count=40)

    theirs = list(webdataset_pipeline(shards.path, shuffle=20, seed=3))

    stream = iter(Stream(shards, batch_size=8, seed=0))
    ours = {shards.keys[index]: (batch, row) for batch in islice(stream, 5) for row, index in enumerate(batch.indices)}
    stream.close()
    found = [sample["__key__"] for sample in theirs]
    assert sorted(found) == sorted(ours) == shards.keys
    assert found != shards.keys
    assert all(same(sample, *ours[sample["__key__"]]) for sample in theirs)
    assert found == keys(webdataset_pipeline(shards.path, shuffle=20, seed=3))
    assert found != keys(webdataset_pipeline(shards.path, shuffle=20, seed=4))


def test_its_shuffle_mixes_shards(make_shards):
    """Tars alone in another order would leave sixteen neighbours side by side."""
    found = [int(key) for key in keys(webdataset_pipeline(make_shards(count=48).path, shuffle=1000))]

    assert sum(abs(one - other) == 1 for one, other in pairwise(found)) < 12


def test_what_is_no_finished_set_is_refused(make_shards, tmp_path):
    (make_shards().path / "dataset.json").unlink()

    with pytest.raises(ShardError, match=r"has no dataset\.json"):
        webdataset_pipeline(tmp_path / "shards")
    with pytest.raises(FileNotFoundError, match="no shard set at"):
        webdataset_pipeline(tmp_path / "nowhere")
