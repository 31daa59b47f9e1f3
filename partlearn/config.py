"""What the verbs of stage 1 compute: `encoder`, `learn-parts`, and the labels of `extract`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.config import RunConfig

PAPER = {
    "background": False,
    "where": "everywhere",
    "relative": False,
    "whiten": 0,
    "diffusion": 0,
    "init": "heads",
    "softmax": "positions",
    "target": "pixels",
}
"""The settings that the paper states or its authors answered (SemMAE, section 3.1)."""
IN_PYTHON = (
    *("background", "foreground_share", "where", "relative", "diffusion", "init", "softmax", "target", "style"),
    *("diversity", "balance", "consistency", "decoder_size"),
)
"""Settings without an option: no other value gained anything in any table (RESULTS.md), or --paper sets it."""
BUILTIN_READS = {"encoder_block": 3, "whiten": 32}
"""What k-means reads best of the encoder `builtin`: its last norm, in fewer directions (encoders/builtin/README.md)."""
TRUTH = "truth"
"""What `extract --parts` calls the part maps that people drew (`partlearn/labelling/truth.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnConfig:
    """A part learner (SemMAE, section 3.1), its open choices settled by measurement (partlearn/RESULTS.md)."""

    images: str
    """Images: a folder, a text file of paths, a .tar or a folder of tars; here or at s3://, gs://."""
    encoder: str
    """Frozen encoder: builtin (comes with the project), timm:NAME, timm:NAME=FILE, ibot:FILE, dino:FILE, run:DIR or
    random:NAME."""
    encoder_block: int | None = None
    """Block (from 0) whose input tokens are read; the number of blocks means after the final norm. Default: the last
    block, and after the norm for builtin."""
    grid: int = 28
    """Cells a side of the part maps; the encoder reads grid x patch pixels."""
    num_parts: int = 6
    """Parts to learn."""
    paper: bool = False
    """The paper's literal form: pixels rebuilt from maps of the whole image, which start at the encoder's heads; no
    k-means, no whitening, no background."""
    background: bool = True
    """One more label, for cells outside the foreground."""
    foreground_share: float | None = None
    """Share of an image's cells that counts as foreground. Default: Otsu's threshold decides in each image."""
    foreground: Literal["contrast", "border", "component", "cut", "attention", "maps"] = "contrast"
    """What ranks the foreground: likeness of tokens to the object's mean rather than the ground's, both found from the
    border; distance to the border's mean; their first principal component; a normalised cut of their graph; class
    attention; or the learned maps."""
    where: Literal["foreground", "everywhere"] = "foreground"
    """Which cells the parts are learned on."""
    relative: bool = True
    """Tokens minus the image's mean (foreground) token, so that parts do not become classes."""
    whiten: int | None = None
    """Number of whitened principal components; 0 disables whitening. Default: 64 (32 for builtin)."""
    diffusion: int = 3
    """Rounds in which a cell's token becomes the mean of its image's cells like it; 0 = none."""
    init: Literal["kmeans", "heads", "random"] = "kmeans"
    """How part queries start: k-means centres, the encoder's attention heads, or at random."""
    softmax: Literal["parts", "positions"] = "parts"
    """Axis of Eq. 2's softmax: each cell chooses its part, or each part its cells."""
    target: Literal["features", "pixels", "both"] = "features"
    """What is rebuilt from the parts: the encoder's tokens, the image (the paper; answered by colour), or both."""
    style: Literal["class", "nothing"] = "class"
    """What AdaIN may know beside the maps (target pixels): the class token, or nothing of the image."""
    diversity: float = 0.03
    """Weight of Eq. 6."""
    balance: float = 0.1
    """Weight of the term that keeps parts equally used (softmax over parts only)."""
    consistency: float = 0.0
    """Weight of the labels' agreement between two crops of an image, mirrored and in other colours; each step then
    looks twice (--crops 0)."""
    crops: int | None = None
    """Crops of each image whose tokens are kept in memory; 0 takes fresh crops every step (slower, for large sets).
    Default: 4 where steps are taken, otherwise 0."""
    steps: int | None = None
    """Updates. Default: none after the k-means start (none gained anything that was measured), otherwise 1,000."""
    batch_size: int = 64
    """Images a step."""
    base_lr: float = 4e-3
    """Learning rate at 256 images a step; scales with the batch."""
    decoder_size: int | None = None
    """Side of the rebuilt image in pixels (target pixels): the grid's side times a power of two.
    Default: times four."""
    seed: int = 0
    """The one seed of the run."""
    run: RunConfig

    def __post_init__(self):
        for name, value in PAPER.items() if self.paper else ():
            asked = getattr(self, name)
            if asked not in (value, type(self).__dataclass_fields__[name].default):
                raise ValueError(
                    f"--paper means {name} {value}, and {name} {asked} was asked for beside it; drop one of the two"
                )
            object.__setattr__(self, name, value)
        for name, value in BUILTIN_READS.items() if self.encoder == "builtin" and self.init == "kmeans" else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.whiten is None:
            object.__setattr__(self, "whiten", 64)
        if not 2 <= self.num_parts <= 255:
            raise ValueError(f"num_parts must lie between 2 and 255 (labels are bytes), got {self.num_parts}")
        if self.foreground_share is not None and not 0 < self.foreground_share <= 1:
            raise ValueError(f"foreground_share must lie in (0, 1], got {self.foreground_share}")
        if self.grid > 256:
            raise ValueError(f"grid must be at most 256 (ranks are two bytes), got {self.grid}")
        if self.steps is None:
            object.__setattr__(self, "steps", 0 if self.init == "kmeans" else 1000)
        if self.crops is None:
            object.__setattr__(self, "crops", 4 if self.steps and not self.consistency else 0)
        if self.consistency and self.crops:
            raise ValueError(f"--consistency looks at fresh crops; take --crops 0 with it, got {self.crops}")
        for name, least in (
            ("grid", 2),
            ("batch_size", 1),
            ("steps", 0),
            ("crops", 0),
            ("whiten", 0),
            ("diffusion", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.decoder_size is None:
            object.__setattr__(self, "decoder_size", 4 * self.grid)
        scale = self.rebuilt_size / self.grid
        if self.target != "features" and scale not in (1, 2, 4, 8, 16):
            raise ValueError(f"decoder_size must be grid {self.grid} times 1, 2, 4, 8 or 16, got {self.rebuilt_size}")
        if self.init != "kmeans" and (self.relative or self.whiten or self.diffusion):
            raise ValueError(
                f"init {self.init} reads the encoder's own tokens; with it, set relative to False, whiten and "
                "diffusion to 0"
            )
        if self.foreground == "maps" and self.where == "foreground":
            raise ValueError(
                "--foreground maps needs maps learned everywhere; with it, take --paper, or set where to everywhere"
            )

    @property
    def updates(self) -> int:
        """`steps`, resolved."""
        assert self.steps is not None
        return self.steps

    @property
    def rebuilt_size(self) -> int:
        """`decoder_size`, resolved."""
        assert self.decoder_size is not None
        return self.decoder_size

    @property
    def directions(self) -> int:
        """`whiten`, resolved."""
        assert self.whiten is not None
        return self.whiten

    @property
    def kept_crops(self) -> int:
        """`crops`, resolved."""
        assert self.crops is not None
        return self.crops


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig:
    """Part labels and foreground ranks beside every image, in WebDataset shards."""

    images: str | None = None
    """Images: a folder, a text file of paths or URIs, a .tar, a folder of tars; here or at s3://, gs://."""
    relabel: Path | None = None
    """Instead of --images: a shard set. Writes a set of labels alone over its images, for `pretrain --labels`."""
    parts: Path = Path("builtin")
    """Run folder of a part learner (`learn-parts`); builtin, the one that comes with the project; a baseline: heads,
    heads-mass, kmeans-image, regions, grid, bands, shuffled-heads, shuffled-kmeans-image; or truth:
    FOLDER/labels/NAME.png (part ids, 0 = background, 255 = unknown) or FOLDER/masks/NAME.png (0, 255) beside
    FOLDER/images/NAME.jpg."""
    encoder: str | None = None
    """Frozen encoder. Default: the one the parts were learned on, which it must be."""
    encoder_block: int | None = None
    """Of a baseline: the block (from 0) whose tokens are read. Default: the last."""
    num_parts: int = 6
    """Of a baseline: parts (heads: as many as there are)."""
    size: int = 224
    """Side of the stored JPEG in pixels."""
    quality: int = 90
    """Quality of the stored JPEG."""
    grid: int | None = None
    """Cells a side of the labels. Default: the part learner's own; 28 for baselines and truth."""
    attention: bool = False
    """Store the last block's class attention too, a uint8 map a head (KEY.attn.npy): 784 bytes a head and image."""
    samples_per_shard: int = 2048
    """Inputs a shard owns."""
    batch_size: int = 64
    """Images the models see at once; never straddles shards."""
    backend: Literal["ray", "local"] = "ray"
    """ray starts or joins a cluster; local needs none."""
    num_workers: int = 0
    """Ray actors; 0 = one a GPU, or one for every two CPUs where there are none."""
    gpus_per_worker: float = 1.0
    """GPU share of an actor, where the cluster has GPUs."""
    seed: int = 0
    """Seed of the order of images in the shards."""
    max_rejects: float = 0.01
    """Share of the inputs, ten of them at least, that may be unreadable before the set is refused."""
    retry_failed: bool = False
    """Build the shards that have rejected images once more: the images were mended, or the disk has come back."""
    run: RunConfig

    def __post_init__(self):
        if (self.images is None) == (self.relabel is None):
            raise ValueError("extract needs either --images (images) or --relabel (a shard set), and not both")
        if str(self.parts) == TRUTH and (self.attention or self.encoder or self.encoder_block is not None):
            raise ValueError(
                "--parts truth looks through no encoder; leave out --attention, --encoder and --encoder-block"
            )
        if not 1 <= self.num_parts <= 255:
            raise ValueError(f"num_parts must lie between 1 and 255 (labels are bytes), got {self.num_parts}")
        if self.size < 16:
            raise ValueError(f"size must be at least 16 pixels, got {self.size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie between 1 and 100, got {self.quality}")
        if not 0 <= self.max_rejects <= 1:
            raise ValueError(f"max_rejects must lie between 0 and 1, got {self.max_rejects}")
        if self.samples_per_shard < 1 or self.batch_size < 1:
            raise ValueError(
                "samples_per_shard and batch_size must be at least 1, got "
                f"{self.samples_per_shard} and {self.batch_size}"
            )
