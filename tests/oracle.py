"""An encoder whose tokens hold the true parts of painted images, and those images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from encoders.frozen import Encoder, Tokens

GRID, CELL, DIM, PARTS = 16, 4, 64, 6
PALETTE = torch.tensor(
    [[20, 20, 20], [250, 20, 20], [20, 250, 20], [20, 20, 250], [250, 250, 20], [250, 20, 250], [20, 250, 250]]
)


class Oracle(Encoder):
    """Reads the parts of a painted image from its colours; tokens are their embeddings and noise of `noise` times
    their length, the class token is the tokens' mean. With `shuffled`, tokens lie anywhere in their image."""

    def __init__(self, *, shuffled: bool = False, noise: float = 0.5):
        self.dim, self.depth, self.heads, self.block = DIM, 1, 4, 0
        self.patch, self.size, self.grid = CELL, GRID * CELL, GRID
        self.device, self.precision, self.fingerprint = torch.device("cpu"), "fp32", "oracle"
        self.description: dict[str, Any] = {"source": "oracle", "block": 0, "weights_sha256": "oracle"}
        self.shuffled, self.noise = shuffled, noise
        embeddings = torch.randn(len(PALETTE), DIM, generator=torch.Generator().manual_seed(5))
        self.embeddings = torch.nn.functional.normalize(embeddings, dim=1)

    def parts_of(self, images: torch.Tensor) -> torch.Tensor:
        """The true part of each cell, 0 the background: the colour of its middle."""
        middles = images[:, CELL // 2 :: CELL, CELL // 2 :: CELL].float()
        return torch.cdist(middles.flatten(1, 2), PALETTE.float()).argmin(dim=2)

    def __call__(self, images: torch.Tensor, ids_visible: torch.Tensor | None = None) -> Tokens:
        generator = torch.Generator().manual_seed(int(images.long().sum()) % 2**31)
        parts = self.parts_of(images)
        if self.shuffled:
            parts = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in parts])
        noise = torch.randn(*parts.shape, DIM, generator=generator) * self.noise * DIM**-0.5
        patches = self.embeddings[parts] + noise
        class_token = patches.mean(dim=1)
        attention = torch.full((len(images), self.heads, GRID**2), GRID**-2)
        return Tokens(class_token, patches, torch.cat([class_token[:, None], patches], dim=1), attention)


def painted(folder: Path, count: int) -> Path:
    """Creatures of blocks: an object of six parts in the middle, its parts shifted about, on a dark ground."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        cells = np.zeros((GRID, GRID), np.int64)
        top, left = random.integers(2, 5, 2)
        for part, place in enumerate(random.permutation(6)):
            row, col = top + 3 * (place // 2), left + 4 * (place % 2)
            cells[row : row + 3, col : col + 4] = part + 1
        pixels = PALETTE.numpy().astype(np.uint8)[cells].repeat(CELL, axis=0).repeat(CELL, axis=1)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def read_all(folder: Path) -> torch.Tensor:
    """The images of a folder, in order of their names."""
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.iterdir())])
