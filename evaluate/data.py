"""Images with classes, as evaluations read them: a shard set or a list of files, and a held-out fifth."""

import dataclasses
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, Integer, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from shards.atomic import sha256_json
from shards.batches import in_order
from shards.decode import ImageError, decode_with, square
from shards.images import ImageFile, ImageList, list_images, read_bytes
from shards.order import permutation
from shards.shard_set import ShardSet
from shards.storage import WHOLE_FILE, is_remote

HELD_OUT = 5
STORED = "stored squares"
"""What shards hold: the square of the short side. Files beside a shard set are cut like it."""
CENTRE_CROP = "short side x 8/7, centre crop"
"""Files by themselves: the protocols' 256 and 224 (`centre_crop`)."""
STRIP = 16
"""Longer strips are cut to this ratio first: 1 x 5,000 pixels would become 256 x 1,280,000."""
MOST_LOST = 0.01
"""Share of the files (and at least ten of them) that may be out of reach; of more, the storage is to blame."""


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
    stored: int | None
    """Side of the set's squares, or of those of the set beside which files are read. None: files by themselves."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Names of the files that the last pass left out, each with its reason."""
    lost: list[str] = field(default_factory=list)
    """Names of those that were out of reach, and not torn."""

    def __len__(self) -> int:
        """Images that have a class."""
        if isinstance(self.images, ShardSet):
            return int((np.asarray(self.images.class_ids) >= 0).sum())
        return len(self.images.images)

    @property
    def preparation(self) -> str:
        """How images become squares: STORED or CENTRE_CROP."""
        return CENTRE_CROP if self.stored is None else STORED

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.images.classes)

    @property
    def fingerprint(self) -> str:
        """Of the images that were read, and of labels laid over them: another one where some were left out."""
        if isinstance(self.images, ShardSet):
            return self.images.identity
        left_out = sorted(self.unreadable)
        return sha256_json([self.images.digest, left_out]) if left_out else self.images.digest

    def batches(self, *, size: int, batch_size: int, threads: int) -> Iterator[LabelledBatch]:
        """Every image with a class once, in order. Files that cannot be read are left out and noted in `unreadable`.

        Raises:
            OSError: The storage does not answer, or more than MOST_LOST of the files are out of reach.
        """
        if isinstance(self.images, ShardSet):
            for batch in in_order(self.images, batch_size=batch_size, threads=threads):
                has = np.asarray(batch.class_ids) >= 0
                if has.any():
                    fgrank = None if batch.fgrank is None else batch.fgrank[has]
                    yield LabelledBatch(batch.images[has], batch.class_ids[has], fgrank)
            return
        self.unreadable, self.lost = {}, []
        listed = self.images.images
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(listed), batch_size):
                chosen = listed[start : start + batch_size]
                tries = list(pool.map(lambda image: _pixels(image, size, self.stored), chosen))
                self._leave_out({f.name: t for f, t in zip(chosen, tries, strict=True) if isinstance(t, Exception)})
                read = [(f.class_id, t) for f, t in zip(chosen, tries, strict=True) if not isinstance(t, Exception)]
                if read:
                    class_ids = np.array([class_id for class_id, _ in read], dtype=np.int64)
                    yield LabelledBatch(np.stack([pixels for _, pixels in read]), class_ids, None)

    def _leave_out(self, failed: dict[str, Exception]) -> None:
        self.unreadable |= {name: str(error) for name, error in failed.items()}  # an error would keep the file's bytes
        self.lost += [name for name, error in failed.items() if isinstance(error, OSError)]
        if len(self.lost) > max(10, MOST_LOST * len(self)):
            raise OSError(
                f"{len(self.lost)} of {len(self)} images in {self.source} are out of reach, the first {self.lost[0]} "
                f"({self.unreadable[self.lost[0]]}); check the storage, then run again"
            )


def load_split(data: str, images: str, labels: str = "") -> Split:
    """The shard set at `data`, with `labels` laid over it, or else the images at `images`; those without a class are
    told and left out.

    Raises:
        ValueError: The others are of fewer than two classes.
    """
    opened = ShardSet.open(Path(data), labels=labels or None) if data else list_images(images)
    split = Split(data or images, opened, opened.size if isinstance(opened, ShardSet) else None)
    if isinstance(opened, ShardSet):
        class_ids = np.asarray(opened.class_ids)
    else:
        class_ids = np.array([image.class_id for image in opened.images], dtype=np.int64)
    missing = int((class_ids < 0).sum())
    if missing and len(set(class_ids.tolist())) < 3:
        raise ValueError(
            f"{missing} of {len(class_ids)} images in {split.source} have no class, and this protocol "
            "needs two classes or more; sort them into one folder a class"
        )
    if missing:
        print(f"{missing} of {len(class_ids)} images in {split.source} have no class and are left out", file=sys.stderr)
    if missing and isinstance(opened, ImageList):
        labelled = tuple(image for image in opened.images if image.class_id >= 0)
        split.images = dataclasses.replace(opened, images=labelled)
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


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The short side resized to size x 8/7 (256 for 224; bicubic, antialiased), then the centre: what DINO and MAE
    evaluate (eval_knn.py, main_linprobe.py), with the same two transforms."""
    if max(image.size) > STRIP * min(image.size):
        width, height = (min(side, STRIP * min(image.size)) for side in image.size)
        image = CenterCrop((height, width))(image)
    return CenterCrop(size)(Resize(round(size * 8 / 7), InterpolationMode.BICUBIC)(image))


def _pixels(file: ImageFile, size: int, stored: int | None) -> UInt8[np.ndarray, "side side 3"] | ImageError | OSError:
    """An image's square as an array, or the reason why it cannot be read."""

    def squared(image: Image.Image) -> np.ndarray:
        return np.asarray(centre_crop(image, size) if stored is None else square(image, stored)[0])

    try:
        return decode_with(read_bytes(file), squared)
    except ImageError as error:
        return error
    except OSError as error:
        if not _gone(file, error):
            raise OSError(f"{file.name} cannot be read ({error}); check the storage, then run again") from error
        return error


def _gone(file: ImageFile, error: OSError) -> bool:
    """Whether this file alone is missing or closed to us, or cannot be read as its listing saw; a lost tar or folder
    takes others with it."""
    if file.fault:
        return True
    alone = file.size == WHOLE_FILE and (is_remote(file.location) or Path(file.location).parent.is_dir())
    return alone and isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
