"""How well an encoder's class tokens tell labelled images apart, while it is trained."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from encoders.knn import knn_votes
from encoders.tokens import vit_tokens
from shards.decode import ImageError
from shards.images import ImageFile, list_images, read_square
from training.augment import IMAGENET_MEAN, IMAGENET_STD, normalised, unit
from training.device import autocast

MOST, CHUNK = 2000, 64


class Monitor:
    """Labelled images in memory, decoded once: the middle square of each at `size` pixels.

    Takes at most 2,000 of them, evenly spaced in the order of their names, and says so on stderr.

    Raises:
        ValueError: The images have no classes, or fewer than two can be read.
    """

    def __init__(self, source: str, *, size: int, threads: int):
        listed = list_images(source)
        if not listed.classes:
            raise ValueError(f"--knn needs a folder of class folders, and the images of {source} have no classes")
        labelled = [image for image in listed.images if image.class_id >= 0]
        count = len(labelled)
        chosen = [labelled[i] for i in np.linspace(0, count - 1, min(count, MOST)).round().astype(int)]
        if count > MOST:
            print(f"--knn takes {MOST:,} of the {count:,} images of {source}, evenly spaced", file=sys.stderr)
        with ThreadPoolExecutor(threads, thread_name_prefix="monitor") as pool:
            found = list(pool.map(lambda file: _read(file, size), chosen))
        images = [image for image in found if image is not None]
        if len(images) < 2:
            raise ValueError(f"--knn needs two readable images or more, and {source} has {len(images)}")
        self.images: UInt8[Tensor, "images size size 3"] = torch.from_numpy(np.stack(images))
        labels = [file.class_id for file, image in zip(chosen, found, strict=True) if image is not None]
        self.labels: Int64[Tensor, " images"] = torch.tensor(labels)

    @torch.no_grad()
    def __call__(
        self,
        encoder: VisionTransformer,
        precision: str,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> float:
        """Accuracy, from 0 to 1, of guessing each image's class from the others' class tokens."""
        device = next(encoder.parameters()).device
        with autocast(device, precision):
            chunks = (normalised(unit(chunk.to(device)), mean, std) for chunk in self.images.split(CHUNK))
            tokens = torch.cat([vit_tokens(encoder, chunk)[:, 0].float() for chunk in chunks])
        return knn_accuracy(tokens, self.labels.to(device))


def knn_accuracy(
    tokens: Float[Tensor, "images dim"],
    labels: Int64[Tensor, " images"],
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the images whose class has the most votes among their nearest others, themselves left out:

    votes[c] = Σ over the k nearest images of class c of exp((cosine - 1) / temperature)

    DINO (arXiv:2104.14294, eval_knn.py), with every image both test and training image.
    """
    tokens, labels = tokens.cpu(), labels.cpu()  # votes are counted in fp64, which MPS has not
    classes = int(labels.max()) + 1
    votes = knn_votes(
        tokens, labels, tokens, classes=classes, neighbours=neighbours, temperature=temperature, leave_one_out=True
    )
    return (votes.argmax(dim=1) == labels).double().mean().item()


def _read(image: ImageFile, size: int) -> np.ndarray | None:
    try:
        return np.array(read_square(image, size).image)
    except ImageError as error:
        print(f"{image.name} cannot be read ({error}); --knn leaves it out", file=sys.stderr)
        return None
