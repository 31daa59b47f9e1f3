"""How fast the stream feeds training, beside bare decoding, stock webdataset and MAE's own loader.

Every row reads the same images, out of the page cache, on one core unless its name says otherwise. What a batch is
differs: `stream` gives uint8 images of 224 px, half of them mirrored, and their labels (normalisation is left to the
accelerator); `webdataset` the same, mirrored none; `imagefolder_mae` decodes the original files, crops, mirrors and
normalises, and has no labels.
"""

import itertools
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import torch
import webdataset
from PIL import features
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from benchmarks.prepared import IMAGENET, IMAGENET_SHARDS, PER_SMALL_SHARD, SIZE, Prepared, prepare
from benchmarks.quiet import cores_here
from benchmarks.rounds import BLOCK_S, Case, Report, Row, exact, gate_in_words, interleaved, ratios, summary
from shards.decode import decode_jpeg_into, memory_for, pixels_in
from shards.order import permutation
from shards.shard_set import ShardSet
from shards.stream import Stream

BATCH = 64
PAIRS = [
    ("stream", "decode_limit"),
    ("stream", "webdataset"),
    ("stream", "imagefolder_mae"),
    ("stream_2_threads", "stream"),
    ("cached_626", "local_626"),
]
BARS = {
    "stream/decode_limit": (">=", 0.85),
    "stream/webdataset": (">=", 2.0),
    "stream/imagefolder_mae": (">=", 10.0),
    "stream_2_threads/stream": (">=", 1.7),
    "cached_626/local_626": (">=", 0.9),
}
TAR_BLOCK = 512
"""Bytes of a member's header in a tar; its data are padded to a multiple."""


def bench_loader(images: str, *, out: Path, minutes: float, most: int, block_s: float = BLOCK_S) -> Report:
    """Measure the loaders on at most `most` of the images; what they read is made under `out`, once.

    Rows that need two cores are left out on a machine of one.

    Raises:
        FileNotFoundError: There are no such images.
    """
    prepared = prepare(images, out, most=most)
    with (
        ShardSet.open(prepared.shards) as shards,
        ShardSet.open(prepared.many) as many,
        ShardSet.open(prepared.small) as small,
        _cached(prepared.small) as cached,
        _one_thread(),
    ):
        cases = [
            Case("stream", _stream(shards, threads=1)),
            Case("stream_2_threads", _stream(shards, threads=2), cores=2),
            Case("imagefolder_mae", _imagefolder(prepared.originals)),
            Case("webdataset", _webdataset(prepared.shards, labelled=bool(shards.classes))),
            Case("decode_limit", _decode(shards)),
            Case("order_1_28m", _calls(_order), unit="s"),
            Case("seek_1_28m", _calls(lambda call: _seek(many, call)), unit="s"),
            Case("local_626", _stream(small, threads=1)),
            Case("cached_626", _stream(cached, threads=1)),
        ]
        cases = [case for case in cases if case.cores <= cores_here()]
        names = [case.name for case in cases]
        pairs = [(over, under) for over, under in PAIRS if over in names]
        blocks = interleaved(cases, pairs=pairs, minutes=minutes, what="bench loader", block_s=block_s)
        count = len(shards)
    rows = [summary(case.name, case.unit, blocks[case.name]) for case in cases]
    rows += [summary(f"{over}/{under}", "ratio", ratios(blocks[over], blocks[under])) for over, under in pairs]
    return Report([*rows, *_sizes(prepared, count)], BARS, _caption(count))


def _stream(shards: ShardSet, *, threads: int) -> Callable[[float], int]:
    """One thread without prefetch stands still between blocks, so one stream serves all of them, as in training. With
    more, each block gets a new one: it would decode ahead while other cases are measured. What that has decoded ahead
    when the block ends is lost to it, 2 % at most.
    """
    if threads == 1:
        still = Stream(shards, batch_size=BATCH, seed=0, flip=True, threads=1, prefetch=0)
        counts = (len(batch.images) for batch in still)
        return lambda seconds: _taken(counts, seconds)
    seeds = itertools.count()

    def run(seconds: float) -> int:
        stream = Stream(shards, batch_size=BATCH, seed=next(seeds), flip=True, threads=threads, prefetch=2)
        with closing(iter(stream)) as batches:
            return _taken((len(batch.images) for batch in batches), seconds)

    return run


def _imagefolder(originals: Path) -> Callable[[float], int]:
    """MAE's training transforms (main_pretrain.py) in the process itself, torchvision's and PyTorch's own pieces."""
    normalise = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    crop = transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    views = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])
    folder = ImageFolder(str(originals), views, is_valid_file=lambda _: True)
    loader = torch.utils.data.DataLoader(folder, batch_size=BATCH, shuffle=True, num_workers=0)
    counts = (len(images) for _ in itertools.count() for images, _ in loader)
    return lambda seconds: _taken(counts, seconds)


def _webdataset(shards: Path, *, labelled: bool) -> Callable[[float], int]:
    """Stock webdataset over our tars: the same uint8 images and labels, batched by its own collate."""
    tars = [str(tar) for tar in sorted((shards / "shards").glob("*.tar"))]
    members = ["jpg", "parts.npy", "fgrank.npy", *(["cls"] if labelled else [])]
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).decode("rgb8")
    batches: Any = samples.to_tuple(*members).batched(BATCH)
    counts = (len(images) for _ in itertools.count() for images, *_ in batches)
    return lambda seconds: _taken(counts, seconds)


def _decode(shards: ShardSet) -> Callable[[float], int]:
    """The least any loader must do: the stored JPEGs, in memory, decoded into one and the same buffer."""
    jpegs = [shards.read(index).jpeg for index in range(len(shards))]
    row = pixels_in(memory_for(SIZE, SIZE, 3), SIZE, SIZE, 3)

    def decoded() -> Iterator[int]:
        for jpeg in itertools.cycle(jpegs):
            decode_jpeg_into(jpeg, row)
            yield 1

    counts = decoded()
    return lambda seconds: _taken(counts, seconds)


def _order(call: int) -> None:
    permutation(IMAGENET, seed=call, epoch=0)


def _seek(many: ShardSet, call: int) -> None:
    """From an open set to a sample half an epoch on: what a resume costs."""
    stream = Stream(many, batch_size=1, seed=call, position=IMAGENET // 2, threads=1, prefetch=0)
    with closing(iter(stream)) as batches:
        next(batches)


def _calls(function: Callable[[int], None]) -> Callable[[float], int]:
    def made() -> Iterator[int]:
        for call in itertools.count():
            function(call)
            yield 1

    counts = made()
    return lambda seconds: _taken(counts, seconds)


def _taken(counts: Iterator[int], seconds: float) -> int:
    """How much comes within about `seconds`."""
    ends, done = time.perf_counter() + seconds, 0
    while time.perf_counter() < ends:
        done += next(counts)
    return done


def _sizes(prepared: Prepared, count: int) -> list[Row]:
    labels = 0
    for path in sorted((prepared.shards / "shards").glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            labels += sum(
                TAR_BLOCK + -(-member.size // TAR_BLOCK) * TAR_BLOCK for member in tar if member.name.endswith(".npy")
            )
    index: dict[str, int] = {}
    table = pq.ParquetFile(prepared.shards / "index.parquet").metadata
    for group in range(table.num_row_groups):
        for number in range(table.num_columns):
            column: Any = table.row_group(group).column(number)
            index[column.path_in_schema] = index.get(column.path_in_schema, 0) + column.total_compressed_size
    sources = index.pop("source")
    return [
        exact("label_bytes_per_image", labels / count, "bytes", count),
        exact("index_bytes_per_image", sum(index.values()) / count, "bytes", count),
        exact("source_bytes_per_image", sources / count, "bytes", count),
    ]


@contextmanager
def _cached(small: Path) -> Iterator[ShardSet]:
    """The set read through a cache that holds all of its copies, made before anything is measured."""
    with TemporaryDirectory(dir=small.parent) as folder, ShardSet.open(small, cache=folder) as shards:
        for index in range(len(shards)):
            shards.read(index)
        yield shards


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _caption(count: int) -> str:
    pillow = f"Pillow {version('pillow')} (libjpeg-turbo {features.version('libjpeg_turbo')})"
    try:
        ours = f"simplejpeg {version('simplejpeg')}"
    except PackageNotFoundError:
        ours = pillow
    return (
        f"{count:,} images, batches of {BATCH}, one core unless a row says otherwise. "
        f"stream: {SIZE} px, mirrored, uint8, labels; webdataset: the same, not mirrored; "
        "imagefolder_mae: original files, cropped, mirrored, normalised, no labels. "
        f"local_626 and cached_626: {IMAGENET_SHARDS} shards of {PER_SMALL_SHARD}, in place and from a cache. "
        f"stream and decode_limit decode with {ours}, webdataset {version('webdataset')} and "
        f"torchvision {version('torchvision')} with {pillow}. {gate_in_words()}"
    )
