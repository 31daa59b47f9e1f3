"""How near the stream comes to bare JPEG decoding: `python benchmarks/stream.py SHARDS`, one thread each.

Rounds are interleaved and the ratio is taken round by round, because machines are noisy. Prints rows
`name value unit n low high` (median and quartiles).
"""

import sys
import time
from itertools import islice

import numpy as np

from shards.dataset import ShardSet
from shards.stream import Stream, decode_jpeg_into

ROUNDS, BATCH, BATCHES = 15, 64, 4


def main(path: str) -> None:
    with ShardSet.open(path) as shards:
        count = BATCH * BATCHES
        jpegs = [shards.read(index % len(shards)).jpeg for index in range(count)]
        row = np.empty((shards.size, shards.size, 3), np.uint8)
        batches = iter(Stream(shards, batch_size=BATCH, seed=0, threads=1, prefetch=0))
        bare, streamed = [], []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for jpeg in jpegs:
                decode_jpeg_into(jpeg, row)
            bare.append(count / (time.perf_counter() - began))
            began = time.perf_counter()
            for _ in islice(batches, BATCHES):
                pass
            streamed.append(count / (time.perf_counter() - began))
        batches.close()
    ratios = np.array(streamed) / np.array(bare)
    for name, values, unit in (
        ("decode_limit", bare, "images/s"),
        ("stream", streamed, "images/s"),
        ("ratio", ratios, ""),
    ):
        low, middle, high = np.percentile(values, [25, 50, 75])
        print(f"{name:13} {middle:10.3f} {unit:9} n {ROUNDS}  low {low:.3f}  high {high:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
