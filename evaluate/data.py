"""Images with classes, as evaluations read them: a shard set or a list of files, and a held-out fifth."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, Integer, UInt8
from torch import Tensor

from shards.batches import in_order
from shards.decode import ImageError, decode_rgb, square
from shards.images import ImageFile, ImageList, list_images, read_bytes
from shards.order import permutation
from shards.shard_set import ShardSet

HELD_OUT = 5


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """Some images of a split, their classes and, from a shard set, their foreground ranks."""

    images: UInt8[np.ndarray, "batch side side 3"]
    class_ids: Int64[np.ndarray, " batch"]
    fgrank: Integer[np.ndarray, "batch rows cols"] | None


@dataclass(slots=True)
class Split:
    """Images with classes: a shard set, or a list of files."""

    source: str
    images: ShardSet | ImageList
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images) if isinstance(self.images, ShardSet) else len(self.images.images)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.images.classes)

    @property
    def fingerprint(self) -> str:
        return self.images.fingerprint if isinstance(self.images, ShardSet) else self.images.digest

    def batches(self, *, size: int, batch_size: int, threads: int) -> Iterator[LabelledBatch]:
        """Every image once, in order. Files that cannot be read are left out and noted in `unreadable`."""
        if isinstance(self.images, ShardSet):
            for batch in in_order(self.images, batch_size=batch_size, threads=threads):
                yield LabelledBatch(batch.images, batch.class_ids, batch.fgrank)
            return
        self.unreadable.clear()
        listed = self.images.images
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(listed), batch_size):
                chosen = listed[start : start + batch_size]
                tries = list(pool.map(lambda image: _pixels(image, size), chosen))
                self.unreadable += [found for found in tries if isinstance(found, str)]
                read = [(p, t) for p, t in zip(chosen, tries, strict=True) if not isinstance(t, str)]
                if read:
                    class_ids = np.array([image.class_id for image, _ in read], dtype=np.int64)
                    yield LabelledBatch(np.stack([pixels for _, pixels in read]), class_ids, None)


def load_split(data: str, images: str) -> Split:
    """The shard set at `data`, or else the images at `images`.

    Raises:
        ValueError: Some images have no class.
    """
    opened = ShardSet.open(Path(data)) if data else list_images(images)
    split = Split(data or images, opened)
    if isinstance(opened, ShardSet):
        class_ids = np.asarray(opened.class_ids)
    else:
        class_ids = np.array([image.class_id for image in opened.images], dtype=np.int64)
    missing = int((class_ids < 0).sum())
    if missing:
        raise ValueError(
            f"{missing} of {len(class_ids)} images in {split.source} have no class, and this protocol "
            "needs one for each; sort them into one folder a class"
        )
    return split


def held_out(count: int, seed: int) -> Tensor:
    """True for every fifth of `count` images in the order that `seed` gives.

    Raises:
        ValueError: There are fewer than five.
    """
    if count < HELD_OUT:
        raise ValueError(
            f"holding out every {HELD_OUT}th image needs at least {HELD_OUT} images, got {count}; "
            "add images or a test split (--val-data, --val-images)"
        )
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.from_numpy(np.asarray(permutation(count, seed=seed, epoch=0)))[::HELD_OUT]] = True
    return held


def same_classes(labels: Int64[Tensor, " images"], test: Split, train: Split) -> Int64[Tensor, " images"]:
    """Class ids of the test split in the training split's numbers, matched by name where both have names.

    Raises:
        ValueError: The test split has a class that the training split lacks.
    """
    if not test.classes or not train.classes or test.classes == train.classes:
        return labels
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise ValueError(
            f"{test.source} has {len(unknown)} classes that {train.source} lacks ({', '.join(unknown[:3])}); "
            "both splits need the same class names"
        )
    return torch.tensor([train.classes.index(name) for name in test.classes])[labels]


def _pixels(file: ImageFile, size: int) -> UInt8[np.ndarray, "side side 3"] | str:
    """An image's centre square as an array, or why there is none."""
    try:
        image, _ = square(decode_rgb(read_bytes(file)), size)
    except ImageError as error:
        return f"{file.name} ({error})"
    return np.asarray(image)
