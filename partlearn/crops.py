"""Images as the part learner sees them: random crops, encoded once and kept, or afresh every step."""

import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from encoders.frozen import Encoder, Tokens
from partlearn.config import LearnConfig
from partlearn.consistency import Again, second_view
from shards.image_batches import ImageBatches
from shards.images import ImageList
from shards.order import permutation
from training.augment import crop, random_boxes, step_generator
from training.progress import Progress

CROP_SCALE = (0.5, 1.0)
ENCODED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class TokenCrop:
    """Crops of a batch of images and what the encoder says of them."""

    pixels: UInt8[Tensor, "batch height width 3"]
    tokens: Tokens
    again: Again | None = None
    """The same images seen again, where labels are to agree."""


class TokenCrops:
    """The crops of a run. With `config.kept_crops`, they are encoded at the first call and kept."""

    def __init__(self, config: LearnConfig, encoder: Encoder, images: ImageList):
        self.config, self.encoder, self.images = config, encoder, images
        self._store: TokenCrop | None = None

    @property
    def count(self) -> int:
        """Views before they come again, or images where every crop is fresh."""
        return max(1, self.config.kept_crops) * len(self.images.images)

    def batches(self, *, step: int, rank: int = 0, world_size: int = 1) -> Generator[TokenCrop, None, None]:
        """Batches from `step` on, for ever; a pure function of the config and the images. Of several ranks, each
        gets its block of every batch; views that are kept are one process's (`learn` sees to it)."""
        if not self.config.kept_crops:
            size = self.config.batch_size
            return _cropped(self.config, self.encoder, self.images, size, step, rank, world_size)
        if self._store is None:
            _refuse_what_does_not_fit(self.config, self.encoder, self.count)
            self._store = _encode_all(self.config, self.encoder, self.images, self.count)
        return _kept(self._store, self.config, self.encoder.device, step)


def _cropped(
    config: LearnConfig,
    encoder: Encoder,
    listed: ImageList,
    batch_size: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[TokenCrop, None, None]:
    """Random resized crops and flips, drawn for the whole batch from (seed, step); a rank's block of them."""
    first, last = rank * batch_size // world_size, (rank + 1) * batch_size // world_size
    batches = ImageBatches(
        listed,
        size=encoder.size,
        batch_size=batch_size,
        seed=config.seed,
        step=step,
        threads=config.run.threads,
        rank=rank,
        world_size=world_size,
    )
    try:
        for images, _ in batches:
            generator = step_generator(config.seed, step)
            boxes = random_boxes(batch_size, scale=CROP_SCALE, generator=generator)[first:last]
            flip = torch.rand(batch_size, generator=generator)[first:last] < 0.5
            pixels = crop(images.permute(0, 3, 1, 2).float() / 255, boxes, encoder.size, flip)
            whole = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            again = None
            if config.consistency:
                again = second_view(whole, encoder, generator=generator, rank=rank, world_size=world_size)
            yield TokenCrop(whole, encoder(whole), again)
            step += 1
    finally:
        batches.close()


def _kept(store: TokenCrop, config: LearnConfig, device: torch.device, step: int) -> Generator[TokenCrop, None, None]:
    """Draws from the kept crops; every one comes once an epoch."""
    count, epoch = len(store.pixels), -1
    order = torch.empty(0, dtype=torch.int64)
    while True:
        rows = []
        for position in range(step * config.batch_size, (step + 1) * config.batch_size):
            if position // count != epoch:
                epoch = position // count
                order = torch.from_numpy(permutation(count, seed=config.seed, epoch=epoch))
            rows.append(int(order[position % count]))
        yield _on(store, rows, device)
        step += 1


def _encode_all(config: LearnConfig, encoder: Encoder, images: ImageList, count: int) -> TokenCrop:
    """The first `count` crops of the endless sequence, tokens in fp16."""
    progress = Progress(count, "encoding", "crops")
    pieces: list[TokenCrop] = []
    with closing(progress), closing(_cropped(config, encoder, images, min(ENCODED_AT_ONCE, count), 0)) as views:
        for view in views:
            pieces.append(_packed(view, config))
            progress.advance(min(len(view.pixels), count - progress.done))
            if progress.done >= count:
                break
    return TokenCrop(
        torch.cat([piece.pixels for piece in pieces])[:count],
        Tokens(
            *(
                torch.cat([getattr(piece.tokens, name) for piece in pieces])[:count]
                for name in Tokens.__dataclass_fields__
            )
        ),
    )


def _packed(view: TokenCrop, config: LearnConfig) -> TokenCrop:
    """Halved to fp16; images only where they are the target, else one pixel of them."""
    pixels = view.pixels if config.target != "features" else view.pixels[:, :1, :1]
    tokens = Tokens(*(getattr(view.tokens, name).half().cpu() for name in Tokens.__dataclass_fields__))
    return TokenCrop(pixels.cpu(), tokens)


def _on(store: TokenCrop, rows: list[int], device: torch.device) -> TokenCrop:
    tokens = Tokens(*(getattr(store.tokens, name)[rows].to(device).float() for name in Tokens.__dataclass_fields__))
    return TokenCrop(store.pixels[rows].to(device), tokens)


def bytes_of_a_view(encoder: Encoder, *, pixels: bool) -> int:
    """Two kinds of tokens and the attention in fp16, and the crop where it is the target."""
    cells = encoder.grid**2
    tokens = 2 * (2 * cells * encoder.dim + 2 * encoder.dim + encoder.heads * cells)
    return tokens + (3 * encoder.size**2 if pixels else 3)


def _refuse_what_does_not_fit(config: LearnConfig, encoder: Encoder, count: int) -> None:
    need = count * bytes_of_a_view(encoder, pixels=config.target != "features")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > free / 2:
        raise ValueError(
            f"{count:,} views need {need / 1e9:.1f} GB for their tokens (twice that while they are gathered), and "
            f"{free / 1e9:.1f} GB are free; lower --crops, or take --crops 0 for fresh crops every step"
        )


def image_target(view: TokenCrop, size: int, encoder: Encoder) -> Float[Tensor, "batch 3 height width"]:
    """Eq. 5's target: the crop in the encoder's normalisation, area-averaged down to the decoder's size."""
    return torch.nn.functional.interpolate(encoder.prepared(view.pixels), size=(size, size), mode="area")
