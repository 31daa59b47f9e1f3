"""A set as the stock webdataset tools read it."""

import io

import numpy as np
import pytest
from PIL import Image

from shards.webdataset import webdataset_pipeline


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves tars to the collector
def test_stock_tools_read_every_sample_as_it_is_in_an_order_of_the_seed(make_shards):
    shards = make_shards(count=20, samples_per_shard=8)
    stored = list(webdataset_pipeline(shards.path, shuffle=0))

    assert [sample["__key__"] for sample in stored] == shards.keys
    for index, sample in enumerate(stored):
        own = shards.read(index)
        assert np.array_equal(sample["jpg"], np.array(Image.open(io.BytesIO(own.jpeg))))
        assert np.array_equal(sample["parts.npy"], own.parts)
        assert np.array_equal(sample["fgrank.npy"], own.fgrank)
        assert int(sample["cls"]) == own.class_id
    orders = [[one["__key__"] for one in webdataset_pipeline(shards.path, shuffle=1, seed=seed)] for seed in range(5)]
    assert all(sorted(order) == shards.keys for order in orders)
    assert len({tuple(order) for order in orders}) > 1  # a buffer of one: the tars alone are shuffled
