"""The image that `learn-parts` leaves beside its figures: some of its images, their foreground and their parts."""

import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

from partlearn.config import LearnConfig
from partlearn.labelling.learned import open_token_labeller
from shards.atomic import write_whole
from shards.decode import ImageError
from shards.images import list_images, read_square
from shards.order import permutation
from training.checkpoint import CheckpointError
from training.contact_sheet import ROWS, brightness, enlarged, png_of, tinted
from training.device import pick_device

SIDE = 224


def show_parts(config: LearnConfig) -> None:
    """Draw the image of a finished run where it has none, and say where it is and what comes next.

    Where photographs or encoder have moved it cannot be drawn, and a line on stderr says so: the parts are learned.
    """
    out = config.run.out
    try:
        if not (out / "parts.png").exists():
            draw_parts(config)
    except (OSError, ValueError, CheckpointError) as error:
        print(f"the parts are learned, but {out / 'parts.png'} was not drawn: {error}", file=sys.stderr)
    else:
        print(f"see {out / 'parts.png'}; then: semmae extract --images {config.images} --parts {out} --out SHARDS")


def draw_parts(config: LearnConfig) -> None:
    """Write `parts.png` into the run folder: centre squares of ROWS of its images, drawn by its seed, how near to
    the best each cell ranks in foreground, and its part; the background dark, a colour the same part in every row.

    Raises:
        OSError, ValueError, CheckpointError: Images or encoder are no longer where they were.
    """
    run = config.run
    labeller = open_token_labeller(run.out, device=pick_device(run.device), precision=run.precision)
    images = np.stack([np.asarray(shown) for shown, _ in zip(_squares(config), range(ROWS), strict=False)])
    labels = labeller(images)
    columns = [
        images,
        images * enlarged(brightness(labels.fgrank), SIDE),
        tinted(images, labels.parts, 1 + labeller.learner.shape.parts),
    ]
    write_whole(run.out / "parts.png", png_of(("image", "foreground", "parts"), columns))


def _squares(config: LearnConfig) -> Iterator[Image.Image]:
    """Of images that can be read; the others were named when they were learned from."""
    images = list_images(config.images).images
    for index in permutation(len(images), seed=config.seed, epoch=0):
        try:
            yield read_square(images[index], SIDE).image
        except ImageError:
            continue
