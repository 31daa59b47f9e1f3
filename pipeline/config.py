"""What the verbs of the pipeline itself take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """A check of a shard set."""

    data: Path
    """Shard set: a folder with dataset.json."""
    level: Literal["fast", "hash", "deep"] = "fast"
    """fast: files and sizes; hash: every digest; deep: every member, checksum, label and image."""
    repair: bool = False
    """Rebuild damaged shards from the images and weights that dataset.json names, to the same digests."""
    json: Path | None = None
    """Write the faults there as a JSON list of rows."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """The whole job, small enough for a laptop without a GPU."""

    images: str | None = None
    """Photographs, labelled with the parts that come with the project. Default: creatures with true parts are drawn,
    and an encoder and parts are learned on those."""
    out: Path = Path("runs/demo")
    """Folder for everything; a second call reuses what is finished."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the models run."""
    seed: int = 0
    """Seed of everything random."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePartsConfig:
    """Part labels against images whose parts are known."""

    images: tuple[str, ...]
    """Folders with images/NAME.jpg beside labels/NAME.png (part ids, 0 = background, 255 = unknown) or masks/NAME.png
    (0 and 255), as large as the image."""
    parts: tuple[str, ...] = ("builtin", "heads", "kmeans-image", "regions", "grid", "bands")
    """Run folders of part learners (builtin: the one that comes with the project), or baselines: heads, heads-mass,
    kmeans-image, regions, grid, bands, shuffled-heads, shuffled-kmeans-image. Runs that differ in their seed alone are
    compared with each other."""
    encoder: tuple[str, ...] = ()
    """Frozen encoders of the baselines. Default: the first learner's, read at its block, or builtin. Baselines are
    scored on every combination of encoder, block and number of parts that matters to them.
    Example, with an untrained control: --encoder dino:dino.pth random:vit_small_patch16_224 --encoder-block 9 11."""
    encoder_block: tuple[int, ...] = ()
    """Blocks (from 0) whose tokens kmeans-image reads; other baselines do not depend on it. Default: the last."""
    encoder_mean: tuple[float, float, float] | None = None
    """Mean by which the images of --encoder were normalised, with pixels between 0 and 1; for weights that do not say.
    Example: --encoder-mean 0.5 0.5 0.5."""
    encoder_std: tuple[float, float, float] | None = None
    """Deviation that goes with --encoder-mean."""
    num_parts: tuple[int, ...] = (6,)
    """Numbers of parts for the baselines; heads always has one part a head. Example: --num-parts 4 6 8."""
    grid: int = 28
    """Cells a side of the label grid, the same for every row; a learner on another grid is refused."""
    size: int = 224
    """Side in pixels that the images are cut to."""
    json: Path | None = None
    """Write the rows there as a JSON list."""
    sheet: Path | None = None
    """Draw the first images of the first folder there (PNG): truth beside the labels of each method, in the order of
    the table; of more than eight methods, one PNG a method (NAME-METHOD.png)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the encoder runs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type of the encoder."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if not self.encoder and (self.encoder_mean or self.encoder_std):
            raise ValueError(
                "--encoder-mean and --encoder-std are of the encoders in --encoder; name one, or drop them"
            )
        if not self.num_parts or not 1 <= min(self.num_parts) <= max(self.num_parts) <= 255:
            raise ValueError(f"num_parts needs numbers between 1 and 255 (labels are bytes), got {self.num_parts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """A benchmark of this machine, beside other loaders or against a bar."""

    name: Positional[Literal["loader", "masking", "extract", "learn", "step", "gpu"]]
    """loader: images a second of the stream and of others; masking: what masks cost, a strategy a row; extract: share
    of labelling outside the models; learn: a step of the part learner over the encoder's bare forward; step: a step
    of pretraining, and AutoMAE's with its scorer's attention read or computed; gpu: everything that a GPU is wanted
    for, in nine minutes (benchmarks/README.md)."""
    images: str | None = None
    """Images. Default: creatures are drawn into --out."""
    parts: Path | None = None
    """Run folder of a part learner (extract). Default: an untrained one, which is enough to measure speed."""
    out: Path | None = None
    """Folder for the data of the benchmark; reused when it exists. Default: runs/bench, and runs/gpu for gpu."""
    json: Path | None = None
    """Write the rows there as a JSON list."""
    minutes: float | None = None
    """Time limit in minutes. Default: 4 (a quiet machine needs less), and 8.4 for gpu."""
    photographs: tuple[Path, ...] = ()
    """Folders with truth (images/ beside labels/ or masks/) on which gpu learns and scores parts. Default: drawings."""
    encoder: str | None = None
    """Frozen encoder of those parts. Default: the one that comes with the project."""
    data: str | None = None
    """Shard set with classes for the masking study of gpu. Default: drawings."""
    rehearse: bool = False
    """Run everything of gpu at toy size, on a CPU; step with a toy model."""
    max_images: int = 1024
    """Largest number of images to use, evenly spaced."""
    build: int = 128
    """Images in a build (extract)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the models run (extract)."""
    threads: int = 2
    """Threads that read and decode images (extract)."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes}")
        if min(self.max_images, self.build, self.threads) < 1:
            raise ValueError(
                "max_images, build and threads must be at least 1, "
                f"got {self.max_images}, {self.build} and {self.threads}"
            )
        if self.parts and self.name != "extract":
            raise ValueError(f"--parts belongs to bench extract, not to bench {self.name}")
        fields = type(self).__dataclass_fields__
        why = {"gpu": "it draws its images and takes the GPU and every core", "masking": "it draws its labels"}
        for name in ("images", "max_images", "build", "device", "threads") if self.name in why else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"bench {self.name} takes no --{name.replace('_', '-')}: {why[self.name]}")
        if self.name != "gpu" and (self.photographs or self.encoder or self.data):
            raise ValueError(f"--photographs, --encoder and --data belong to bench gpu, not to bench {self.name}")
        if self.rehearse and self.name not in ("gpu", "step"):
            raise ValueError(f"--rehearse belongs to bench gpu and bench step, not to bench {self.name}")
        if self.images and self.name == "step":
            raise ValueError("bench step takes no --images: it steps on noise")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitConfig:
    """A verb, run on a Ray cluster from a copy of this checkout."""

    job: Positional[tuple[str, ...]] = ()
    """The verb and its flags, after --; paths are absolute and on storage that all nodes see. A quoted ~ is the home
    of the account that runs the job."""
    address: str | None = None
    """The cluster's dashboard, http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, then a Ray
    started here."""
    working_dir: Path = Path()
    """The checkout to send."""
    runtime_env: Path | None = None
    """Ray runtime environment (YAML) of the job. Default: pipeline/cluster/runtime_env.yaml."""
    debug: bool = False
    """Show the traceback of an error."""
