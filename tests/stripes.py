"""Images of stripes and an encoder small enough for them."""

from pathlib import Path

import numpy as np
from PIL import Image

from encoders.distill.config import EncoderConfig
from training.config import RunConfig

TINY = {
    "size": 16, "local_size": 8, "local_crops": 2, "patch": 4, "embed_dim": 32, "depth": 2, "heads": 2,
    "prototypes": 32, "epochs": 4, "batch_size": 16, "base_lr": 0.02, "warmup_epochs": 0.5, "teacher_momentum": 0.9,
}  # fmt: skip


def draw_stripes(folder: Path, count: int, *, seed: int = 0) -> str:
    """A folder of images, each of stripes of its own angle and colours."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:24, :24]
    for number in range(count):
        angle, colours = rng.uniform(0, np.pi), rng.uniform(0, 255, (2, 3))
        stripes = (np.sin(x * np.cos(angle) + y * np.sin(angle)) > 0)[..., None]
        Image.fromarray((stripes * colours[0] + ~stripes * colours[1]).astype(np.uint8)).save(folder / f"{number}.png")
    return str(folder)


def tiny(images: str, out: Path, *, precision: str = "fp32", **settings) -> EncoderConfig:
    run = RunConfig(out=out, device="cpu", precision=precision, threads=1)
    return EncoderConfig(images=images, run=run, **(TINY | settings))
