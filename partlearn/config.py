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
    "init": "random",
    "gate": "sigmoid",
    "projections": "shared",
    "temperature": "none",
    "softmax": "positions",
    "target": "pixels",
    "pixel_error": "sum",
    "foreground": "maps",
}
"""Equations 1 to 7 as SemMAE prints them (section 3.1); where it is silent: partlearn/METHOD.md."""
IN_PYTHON = (
    *("background", "foreground_share", "where", "relative", "diffusion", "init", "kinds", "softmax", "target"),
    *("style", "diversity", "balance", "consistency", "decoder_size", "gate", "projections", "temperature"),
    "pixel_error",
)
"""Settings without an option: no other value gained anything in any table (RESULTS.md), or --paper sets it."""
KINDS = 4
"""Three to six separate people, cars and the rest; more split one kind of object into its views (docs/log.md)."""
BUILTIN_READS = {"encoder_block": 3, "whiten": 32}
"""What k-means reads best of the encoder `builtin`: its last norm, in fewer directions (encoders/builtin/README.md)."""
TRUTH = "truth"
"""What `extract --parts` calls the part maps that people drew (`partlearn/labelling/truth.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnConfig:
    """A part learner (SemMAE, section 3.1), its open choices settled by measurement (partlearn/RESULTS.md)."""

    images: str
    """Images: a folder (class folders or flat), a text file of paths or URIs (a line each, then perhaps a tab, comma or
    blank and the class), a .tar (also of tars) or a folder of tars (KEY.jpg with KEY.cls, class folders, or a tar a
    class); here or at s3://, gs://."""
    encoder: str
    """Frozen encoder: builtin (comes with the project), timm:NAME, timm:NAME=FILE, ibot:FILE, dino:FILE, run:DIR or
    random:NAME."""
    encoder_block: int | None = None
    """Block (from 0) whose input tokens are read; the number of blocks stands for the final norm's output. Default: the
    last block (for builtin, the final norm)."""
    encoder_mean: tuple[float, float, float] | None = None
    """Mean by which the encoder's images were normalised, with pixels between 0 and 1; for weights that do not say.
    Example: --encoder-mean 0.5 0.5 0.5."""
    encoder_std: tuple[float, float, float] | None = None
    """Deviation that goes with --encoder-mean."""
    grid: int = 28
    """Cells a side of the part maps; the encoder reads grid x patch pixels."""
    num_parts: int = 6
    """Parts to learn."""
    paper: bool = False
    """The method as the paper prints it (Eq. 1 to 7): part maps start at random and are trained to rebuild the pixels
    of the whole image; their sum ranks the foreground. No k-means, whitening or background label."""
    background: bool = True
    """Give cells outside the foreground a label of their own."""
    foreground_share: float | None = None
    """Share of an image's cells that count as foreground. Default: Otsu's threshold, image by image."""
    foreground: Literal["contrast", "border", "component", "cut", "attention", "maps"] | None = None
    """How a cell's foreground rank is computed. contrast: similarity to the object's mean token minus that to the
    background's, both found from the border. border: distance to the border's mean token. component: first principal
    component of the image's tokens. cut: normalised cut of their graph. attention: class attention. maps: the sum of
    the learned part maps. Default: contrast; maps with --paper."""
    where: Literal["foreground", "everywhere"] = "foreground"
    """Which cells the parts are learned on."""
    relative: bool = True
    """Subtract the image's mean (foreground) token, so that parts do not become classes."""
    whiten: int | None = None
    """Number of whitened principal components; 0 disables whitening. Default: 64 (32 for builtin)."""
    diffusion: int = 3
    """Rounds of diffusion: each token becomes the mean of the similar tokens of its image; 0 disables it."""
    init: Literal["kmeans", "heads", "random"] = "kmeans"
    """How part queries start: k-means centres, the encoder's attention heads, or at random."""
    kinds: int | None = None
    """Kinds of objects, found from their mean tokens; each kind has part centres of its own, which begin as those of
    all. Default: 4, because photographs show several; 1 where steps are taken."""
    gate: Literal["double", "sigmoid"] = "double"
    """Eq. 1's gate: 2 sigmoid, 1 at the start; or sigmoid without biases, as printed, drawn at random."""
    projections: Literal["part", "shared"] = "part"
    """Eq. 2's projections: a pair for each part, of a head's width, with biases; or one pair for all without biases, as
    printed, of the encoder's width."""
    temperature: Literal["trained", "none"] = "trained"
    """Factor of Eq. 2's dot product: trained from 1/sqrt(width) on; or none, as printed."""
    softmax: Literal["parts", "positions"] = "parts"
    """Axis of Eq. 2's softmax: each cell chooses its part, or each part its cells."""
    target: Literal["features", "pixels", "both"] = "features"
    """What is rebuilt from the parts: the encoder's tokens, the image (the paper; parts then follow colour), or
    both."""
    pixel_error: Literal["mean", "sum"] = "mean"
    """Eq. 5 over the three channels: their mean, or their sum, as printed."""
    style: Literal["class", "nothing"] = "class"
    """What AdaIN is given besides the maps (target pixels): the class token, or nothing of the image."""
    diversity: float = 0.03
    """Weight of Eq. 6."""
    balance: float = 0.1
    """Weight of the term that keeps parts equally used (softmax over parts only)."""
    consistency: float = 0.0
    """Weight of the agreement of the labels of two crops of an image, one mirrored and recoloured. Each step then takes
    two crops (crops 0)."""
    crops: int | None = None
    """Crops per image whose tokens are kept in memory; 0 takes fresh crops every step (slower, for sets that do not
    fit). Default: 4 if steps are taken, otherwise 0."""
    steps: int | None = None
    """Number of updates. Default: 0, because steps after k-means gained nothing that was measured; 1,000 with
    --paper."""
    batch_size: int = 64
    """Images a step."""
    base_lr: float = 4e-3
    """Learning rate at 256 images a step; scales with the batch."""
    decoder_size: int | None = None
    """Side of the rebuilt image in pixels (target pixels): the grid's side times a power of two.
    Default: times four."""
    seed: int = 0
    """Seed of everything random in the run."""
    run: RunConfig

    def __post_init__(self):
        for name, value in PAPER.items() if self.paper else ():
            asked = getattr(self, name)
            if asked not in (value, type(self).__dataclass_fields__[name].default):
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"--paper means {flag} {value}, and {flag} {asked} was asked for beside it; drop one of the two"
                )
            object.__setattr__(self, name, value)
        for name, value in BUILTIN_READS.items() if self.encoder == "builtin" and self.init == "kmeans" else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.whiten is None:
            object.__setattr__(self, "whiten", 64)
        if self.foreground is None:
            object.__setattr__(self, "foreground", "contrast")
        if not 2 <= self.num_parts <= 255:
            raise ValueError(f"num_parts must lie between 2 and 255 (labels are bytes), got {self.num_parts}")
        if self.foreground_share is not None and not 0 < self.foreground_share <= 1:
            raise ValueError(f"foreground_share must lie in (0, 1], got {self.foreground_share}")
        if self.grid > 256:
            raise ValueError(f"grid must be at most 256 (ranks are two bytes), got {self.grid}")
        if self.steps is None:
            object.__setattr__(self, "steps", 0 if self.init == "kmeans" else 1000)
        by_rule = self.init == "kmeans" and not self.steps
        if self.kinds is None:
            object.__setattr__(self, "kinds", KINDS if by_rule else 1)
        if self.kinds_of_objects > 1 and not by_rule:
            raise ValueError(
                f"kinds {self.kinds} is asked for with steps or without init kmeans, and kinds of objects are not "
                "trained; set kinds to 1"
            )
        if self.crops is None:
            object.__setattr__(self, "crops", 4 if self.steps and not self.consistency else 0)
        if self.consistency and self.crops:
            raise ValueError(f"consistency needs fresh crops; set crops to 0 with it, got {self.crops}")
        for name, least in (
            ("grid", 2),
            ("kinds", 1),
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
        if self.init == "heads" and self.projections == "shared":
            raise ValueError(
                "one shared pair of projections cannot start as separate heads; with projections shared, set init to "
                "random or kmeans"
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
    def scorer(self) -> Literal["contrast", "border", "component", "cut", "attention", "maps"]:
        """`foreground`, resolved."""
        assert self.foreground is not None
        return self.foreground

    @property
    def rebuilt_size(self) -> int:
        """`decoder_size`, resolved."""
        assert self.decoder_size is not None
        return self.decoder_size

    @property
    def kinds_of_objects(self) -> int:
        """`kinds`, resolved."""
        assert self.kinds is not None
        return self.kinds

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
    """Images: a folder (class folders or flat), a text file of paths or URIs (a line each, then perhaps a tab, comma or
    blank and the class), a .tar (also of tars) or a folder of tars (KEY.jpg with KEY.cls, class folders, or a tar a
    class); here or at s3://, gs://."""
    relabel: Path | None = None
    """A shard set, instead of --images. Only labels are written, over the images of that set, for `pretrain
    --labels`."""
    parts: Path = Path("builtin")
    """Where the labels come from: the run folder of a part learner (`learn-parts`); builtin (comes with the project); a
    baseline (heads, heads-mass, kmeans-image, regions, grid, bands, shuffled-heads or shuffled-kmeans-image); or truth,
    which reads FOLDER/labels/NAME.png (part ids, 0 = background, 255 = unknown) or FOLDER/masks/NAME.png (0 and 255)
    beside FOLDER/images/NAME.jpg."""
    boxes: Path | None = None
    """Boxes in place of --parts: a text file with a line a box, NAME X0 Y0 X1 Y1 in pixels of the image (the last ones
    included), several lines an image where it has several. Inside is one part; the background is last."""
    encoder: str | None = None
    """Frozen encoder; it must be the one that the parts were learned on. Default: that one."""
    encoder_block: int | None = None
    """For baselines: block (from 0) whose tokens are read. Default: the last."""
    encoder_mean: tuple[float, float, float] | None = None
    """Mean by which the encoder's images were normalised, with pixels between 0 and 1. Default: the one the parts were
    learned with; for baselines, what the weights say."""
    encoder_std: tuple[float, float, float] | None = None
    """Deviation that goes with --encoder-mean."""
    num_parts: int | None = None
    """For baselines: number of parts (heads always has one part a head). Default: 6."""
    size: int = 224
    """Side of the stored JPEG in pixels."""
    quality: int = 90
    """Quality of the stored JPEG."""
    grid: int | None = None
    """Cells a side of the label grid. Default: the part learner's grid; 28 for baselines, truth and boxes."""
    attention: bool = False
    """Also store the last block's class attention (KEY.attn.npy): one uint8 map per head, 784 bytes each."""
    samples_per_shard: int = 2048
    """Images per shard, counted before any is rejected."""
    batch_size: int = 64
    """Images that the models take at once; a batch never spans two shards."""
    backend: Literal["ray", "local"] = "ray"
    """ray: starts or joins a cluster. local: runs in this process."""
    num_workers: int = 0
    """Ray actors; 0 = one per GPU, or one for every two CPUs on a cluster without GPUs."""
    gpus_per_worker: float = 1.0
    """Share of a GPU that an actor takes, on a cluster with GPUs."""
    seed: int = 0
    """Seed of the order of images in the shards."""
    max_rejects: float = 0.01
    """Share of the images that may be unreadable before the set is refused; ten images are always allowed."""
    retry_failed: bool = False
    """Rebuild the shards that have rejected images, once the images or the disk have been repaired."""
    run: RunConfig

    def __post_init__(self):
        if (self.images is None) == (self.relabel is None):
            raise ValueError("extract needs either --images (images) or --relabel (a shard set), and not both")
        through = (self.encoder, self.encoder_block, self.encoder_mean, self.encoder_std, self.num_parts)
        if self.boxes and str(self.parts) not in ("builtin", TRUTH):
            raise ValueError(f"--boxes are the parts, and --parts {self.parts} names others; leave one of the two out")
        true = "--boxes" if self.boxes else "--parts truth" if str(self.parts) == TRUTH else ""
        if true and (self.attention or any(one is not None for one in through)):
            raise ValueError(
                f"{true} looks through no encoder and has the parts that were drawn; leave out --attention, --encoder, "
                "--encoder-block, --encoder-mean, --encoder-std and --num-parts"
            )
        if self.num_parts is not None and not 1 <= self.num_parts <= 255:
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
