"""What the verbs `knn` and `probe` compute."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureConfig:
    """Which frozen features of which images are scored."""

    checkpoint: str = ""
    """Run folder (its newest whole checkpoint) or one checkpoint file."""
    encoder: str = ""
    """Instead of a checkpoint: builtin, timm:NAME, timm:NAME=FILE, ibot:FILE, dino:FILE, run:DIR or random:NAME."""
    encoder_mean: tuple[float, float, float] | None = None
    """Mean by which the encoder's images were normalised, with pixels between 0 and 1; for weights of --encoder that do
    not say. Example: --encoder-mean 0.5 0.5 0.5."""
    encoder_std: tuple[float, float, float] | None = None
    """Deviation that goes with --encoder-mean."""
    data: str = ""
    """Shard set with classes: the training split."""
    images: str = ""
    """Instead of a shard set: images in class folders."""
    val_data: str = ""
    """Shard set of the test split. Default: every fifth image, in a seeded order, is held out."""
    val_images: str = ""
    """Instead of a shard set: images of the test split in class folders."""
    labels: str = ""
    """Label set laid over --data, whose ranks --tokens kept reads: a folder, or a name in the set's labels/. Default:
    the labels in the shards."""
    val_labels: str = ""
    """The same for --val-data."""
    size: int | None = None
    """Side of the encoder's input in pixels. Default: the encoder's own."""
    tokens: Literal["full", "kept"] = "full"
    """full: every patch. kept: those best in the foreground rank, as pretraining keeps them (shard sets only)."""
    keep_share: float | None = None
    """Share of the patches with --tokens kept. Default: what the checkpoint was pretrained with."""
    pool: Literal["class", "mean"] = "class"
    """Which feature is scored: the class token, or the mean of the patch tokens, both after the final norm."""
    batch_size: int = 64
    """Images the encoder sees at once."""
    seed: int = 0
    """Seed of everything random in the run."""
    json: Path | None = None
    """Also write the rows to this file, as one JSON list."""
    out: Path | None = None
    """The rows are appended to results.jsonl in this folder. Default: the checkpoint's run folder, or ./runs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the encoder runs; auto takes cuda, then mps, then cpu."""
    threads: int = 2
    """Threads that read and decode images."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        _exactly_one(self, "checkpoint", "encoder")
        _exactly_one(self, "data", "images")
        if self.val_data and self.val_images:
            raise ValueError("the test split is either --val-data or --val-images, got both")
        if self.tokens == "kept" and (self.images or self.val_images):
            raise ValueError("--tokens kept needs the foreground rank of a shard set; use --data and --val-data")
        if self.tokens != "kept" and (self.keep_share is not None or self.labels or self.val_labels):
            raise ValueError("--keep-share, --labels and --val-labels choose the patches of --tokens kept; add it")
        if self.keep_share is not None and not 0 < self.keep_share <= 1:
            raise ValueError(f"keep_share must lie in (0, 1], got {self.keep_share}")
        if self.val_labels and not self.val_data:
            raise ValueError("--val-labels are laid over --val-data, which is missing")
        if self.val_data and bool(self.labels) != bool(self.val_labels):
            raise ValueError(
                "patches of both splits are kept by one labeller: give --labels and --val-labels, or neither"
            )
        if self.batch_size < 1 or self.threads < 1:
            raise ValueError(f"batch_size and threads must be at least 1, got {self.batch_size} and {self.threads}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnConfig(FeatureConfig):
    """Weighted k-NN classification on frozen features (DINO, arXiv:2104.14294)."""

    neighbours: int = 20
    """Nearest training images that vote; at most all of them."""
    temperature: float = 0.07
    """A neighbour's vote is exp(cosine / temperature)."""

    def __post_init__(self):
        FeatureConfig.__post_init__(self)
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig(FeatureConfig):
    """Linear probe on frozen features of centre crops (MAE, arXiv:2111.06377, appendix A.1)."""

    epochs: int = 90
    """Passes over the training features."""
    base_lr: float = 0.1
    """LARS learning rate at 256 features a step; scales with the batch."""
    warmup_epochs: float = 10.0
    """Epochs of rising learning rate."""
    probe_batch: int | None = None
    """Features a step. Default: MAE's 16,384, or 256 below 10,000 images, with the learning rate of 16,384."""

    def __post_init__(self):
        FeatureConfig.__post_init__(self)
        if self.epochs < 1 or (self.probe_batch is not None and self.probe_batch < 2):
            raise ValueError(
                f"epochs must be at least 1, probe_batch at least 2, got {self.epochs}, {self.probe_batch}"
            )
        if self.base_lr <= 0 or self.warmup_epochs < 0:
            raise ValueError(
                f"base_lr must be above 0 and warmup_epochs not negative, got {self.base_lr} and {self.warmup_epochs}"
            )


def _exactly_one(config: FeatureConfig, first: str, second: str) -> None:
    if bool(getattr(config, first)) == bool(getattr(config, second)):
        got = "both" if getattr(config, first) else "neither"
        raise ValueError(f"give either --{first} or --{second}, got {got}")
