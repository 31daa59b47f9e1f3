"""What the verb `pretrain` computes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pretrain.masking.config import BELONGS, MaskingConfig, refuse_masks_out_of_range
from shards.atomic import read_json
from training.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRun(RunConfig):
    """Where and how fast a run computes that reads a stream of shards; nothing here changes a result."""

    cache: Path | None = None
    """Folder on a local disk. Shards are copied there ahead of use and checked (needed for s3:// and gs://)."""
    cache_gb: float = 50.0
    """Largest total size of the copies in --cache, in GB."""
    micro_batch: int | None = None
    """Images that a rank takes through the model at once; gradients add up over its batch. Default: what
    fits half of a GPU's memory; elsewhere the whole batch."""
    keep_every: int = 0
    """Epochs between checkpoints that are never removed, each with a sheet of masks and reconstructions in pictures/;
    0 = only the newest are kept."""
    keep_last: int = 2
    """Newest checkpoints that are kept. With 1, a torn one leaves none to go on from."""
    knn: str | None = None
    """Folder of class folders. Its k-NN accuracy (leave-one-out, at most 2,000 images) is logged as `knn`."""
    knn_every: int = 10
    """Epochs between two such measurements; the start and the end are always measured."""

    def __post_init__(self):
        super(StreamRun, self).__post_init__()
        if self.cache_gb <= 0:
            raise ValueError(f"cache_gb must be above 0, got {self.cache_gb}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if self.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {self.keep_last}")
        if self.keep_every < 0 or self.knn_every < 1:
            raise ValueError(
                f"keep_every must not be negative and knn_every at least 1, got {self.keep_every} and {self.knn_every}"
            )


METHOD = (
    *(field.name for field in fields(MaskingConfig) if field.name != "predicted"),
    *("patch", "embed_dim", "depth", "heads"),
    *("decoder_dim", "decoder_depth", "decoder_heads", "norm_pix_loss", "flip", "crop_scale"),
)
"""What a preset fixes."""
UNSET = (*BELONGS, "mask_ratio", "predicted", "flip", "weight_decay")
"""What no preset sets: its default is the one below."""
FREE = ("predicted", "epochs", "batch_size", "base_lr", "warmup_epochs", "weight_decay")
"""What a preset proposes, and what may stand beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig(MaskingConfig):
    """A masked autoencoder on a shard set. The paper's runs: 800 epochs, batch 4,096, patch 16 with every patch, or
    patch 8 with the foreground quarter (--keep-share 0.25)."""

    data: str
    """Shard set: a folder with dataset.json, or its URI (s3://, gs://) together with --cache."""
    labels: str | None = None
    """Label set to use with these images (`extract --relabel`): a folder, or a name in the set's labels/. Default: the
    labels in the shards."""
    preset: (
        Literal[
            "tiny",
            "small",
            "mae-b16",
            "semmae-b16",
            "semmae-b8-foreground",
            "colormae-b16",
            "automae-b16",
            "hpm-b16",
        ]
        | None
    ) = None
    """A named run (pretrain/presets.py). It fixes the method: masking, model, patch, shares, targets, augmentation.
    Default: a model and a schedule that fit the set and the machine."""
    init: str | None = None
    """Weights to begin with, an encoder source of the model's size: run:DIR, timm:NAME, timm:NAME=FILE, ibot:FILE or
    dino:FILE; a decoder that comes with it and has the run's size is taken too. Default: drawn from the seed."""
    patch: int = 16
    """Patch side in pixels."""
    embed_dim: int = 768
    """Width of the encoder. ViT-Ti, S, B, L and H have 192, 384, 768, 1024 and 1280."""
    depth: int = 12
    """Blocks of the encoder. ViT-Ti, S and B have 12, L has 24, H has 32."""
    heads: int = 12
    """Attention heads of the encoder. ViT-Ti, S, B, L and H have 3, 6, 12, 16 and 16."""
    decoder_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    norm_pix_loss: bool = True
    """Normalise each patch's target pixels to mean 0 and deviation 1."""
    flip: bool = True
    """Mirror every other image, with its labels (the paper)."""
    crop_scale: float = 1.0
    """Smallest share of an image's area that a random resized crop keeps; labels are cropped with the image. 1 = no
    crop (the paper), 0.2 = MAE's."""
    window: int = 0
    """Number of shards shuffled together; 0 = all. About 8 suits slow or remote disks."""
    substitutes: int = 0
    """Damaged samples that a rank may replace by their neighbours, each with a warning; 0 stops at the first."""
    epochs: int = 800
    """Passes over the images; 0 leaves an untrained encoder, as a control."""
    batch_size: int = 4096
    """Images a step, over all ranks."""
    base_lr: float = 1.5e-4
    """Learning rate at 256 images a step; scales with the batch."""
    warmup_epochs: float = 40.0
    """Epochs over which the learning rate rises. With --epochs alone, its share of the run stays."""
    weight_decay: float = 0.05
    """AdamW's weight decay; biases, norms and tokens have none."""
    seed: int = 0
    """Seed of everything random in the run."""
    run: StreamRun

    def __post_init__(self):
        refuse_out_of_range({one.name: getattr(self, one.name) for one in fields(self)})
        self.refuse_idle_settings()
        for dim, heads in (("embed_dim", "heads"), ("decoder_dim", "decoder_heads")):
            if getattr(self, dim) % 4 or getattr(self, dim) % getattr(self, heads):
                raise ValueError(
                    f"{dim} must be a multiple of 4 and of {heads} {getattr(self, heads)}, got {getattr(self, dim)}"
                )


def config_of(run: Path) -> PretrainConfig:
    """The config of the pretraining in this folder.

    Raises:
        ValueError: It is a folder of something else.
        OSError: There is no config.json.
    """
    told = read_json(run / "config.json")
    if told.pop("verb", None) != PretrainConfig.__name__:
        raise ValueError(f"{run} is not the folder of a pretraining; its config.json says so")
    where = told.pop("run") | {"out": run}
    cache = where.get("cache") and Path(where["cache"])
    return PretrainConfig(**told, run=StreamRun(**where | {"cache": cache}))


def refuse_out_of_range(settings: Mapping[str, Any]) -> None:
    """Check each setting by itself: all of a config, or the few that a command line gave.

    Raises:
        ValueError: One is out of its range.
    """
    refuse_masks_out_of_range(settings)
    if not 0 < settings.get("crop_scale", 1) <= 1:
        raise ValueError(f"crop_scale must lie in (0, 1], got {settings['crop_scale']}")
    for name in ("window", "substitutes"):
        if settings.get(name, 0) < 0:
            raise ValueError(f"{name} must not be negative, got {settings[name]}")
    for name in ("epochs", "warmup_epochs", "base_lr", "weight_decay"):
        if not 0 <= settings.get(name, 0) < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {settings[name]}")
    sizes = ("patch", "batch_size", "embed_dim", "depth", "heads", "decoder_dim", "decoder_depth", "decoder_heads")
    for name in sizes:
        if settings.get(name, 1) < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")
