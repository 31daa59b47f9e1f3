"""For people who want the stock tools: our shards as a plain webdataset pipeline."""

import random
from pathlib import Path
from typing import Any

import webdataset

from shards.info import read_info
from shards.writer import shard_paths


def webdataset_pipeline(path: str | Path, *, shuffle: int = 1000, seed: int = 0) -> Any:
    """An iterable of dicts with `__key__`, `jpg` (uint8, height x width x 3), `cls` where there are classes,
    `parts.npy` and `fgrank.npy`; shuffled as webdataset does it: the tars afresh each epoch, then a buffer of `shuffle`
    samples.

    0 keeps the stored order. What our own stream promises beyond that is webdataset's not to give: it compares no
    checksum, takes a tar that was cut between two members for a whole one, cannot resume, and hands unequal shares
    to ranks. Run `verify` first.

    Raises:
        FileNotFoundError, ShardError: There is no finished set (see `ShardSet.open`).
    """
    folder = Path(path)
    urls = [str(shard_paths(folder, number)[0]) for number in range(len(read_info(folder)["shards"]))]
    pipeline = webdataset.WebDataset(
        urls,
        shardshuffle=len(urls) if shuffle else False,
        detshuffle=bool(shuffle),
        seed=seed,
        nodesplitter=webdataset.split_by_node,
        empty_check=False,
    )
    if shuffle:
        pipeline = pipeline.shuffle(shuffle, rng=random.Random(seed))
    return pipeline.decode("rgb8")
