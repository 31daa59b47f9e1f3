"""Named pretrainings, and what a pretraining without a name follows from: its set and its machine."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pretrain.config import FREE, METHOD, PretrainConfig, StreamRun, refuse_out_of_range
from shards.atomic import read_json
from shards.places import refuse_unwritable
from shards.shard_set import ShardSet
from training.run_folder import untouched

PASSES = 20_000
"""Images that `tiny` takes: about 5 minutes at 224 px on two CPU cores (346 s at a load of 4 to 5)."""

GPU_PASSES = 1_000_000
"""Images that `small` takes at least: 2,000 steps, however small the set is."""

LARGE = 200_000
"""Images from which on ViT-B is chosen on a GPU."""


@dataclass(frozen=True, slots=True)
class SetShape:
    """What the choice depends on: images in the set, their side in pixels, and the side of its label grid."""

    images: int
    size: int
    grid: int


Settings = dict[str, Any]


def tiny(set_: SetShape) -> Settings:
    """A laptop, minutes: a ViT of 6 blocks, 192 wide, with semantic masking.

    Command: semmae pretrain --preset tiny --data runs/shards --out runs/tiny
    Hardware: two CPU cores, 2 GB.
    Hours: 0.1 at 224 px: 20,000 images are taken; a larger set is taken once, in proportion longer.
    Expect: features above those of an untrained encoder; it is a first look, no result.
    """
    model = {"embed_dim": 192, "depth": 6, "heads": 3, "decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3}
    epochs = max(1, round(PASSES / set_.images))
    schedule = {"epochs": epochs, "batch_size": 64, "base_lr": 2e-3, "warmup_epochs": epochs / 20}
    return {"patch": patch_of(set_), **model, **schedule}


def small(set_: SetShape) -> Settings:
    """One GPU, hours: ViT-S with a decoder of 4 blocks and semantic masking.

    Command: semmae pretrain --preset small --data /data/shards --out /runs/small
    Hardware: one GPU of 16 GB.
    Hours: not yet measured by us.
    Expect: not yet run by us; compare it with the same command and --masking random.
    """
    model = {"embed_dim": 384, "depth": 12, "heads": 6, "decoder_dim": 256, "decoder_depth": 4, "decoder_heads": 8}
    epochs = max(400, round(GPU_PASSES / set_.images))
    schedule = {"epochs": epochs, "batch_size": 512, "base_lr": 5e-4, "warmup_epochs": epochs / 20}
    return {"patch": patch_of(set_), **model, **schedule}


def mae_b16(set_: SetShape) -> Settings:
    """MAE's own ViT-B/16 (arXiv:2111.06377): random masks, random resized crops.

    Command: torchrun --nproc-per-node 8 -m pipeline pretrain --preset mae-b16 --data /data/shards --out /runs/mae
    Hardware: 8 GPUs of 80 GB, or more with --micro-batch.
    Hours: not yet measured by us.
    Expect: on ImageNet, fine-tuned 83.3, linear probe 65.1 (other people's MAE of 800 epochs); not yet run by us.
    """
    return {"masking": "random", "crop_scale": 0.2}


def semmae_b16(set_: SetShape) -> Settings:
    """SemMAE's ViT-B/16 (arXiv:2206.10207): gamma 2, all patches, 800 epochs.

    Command: torchrun --nproc-per-node 8 -m pipeline pretrain --preset semmae-b16 --data /data/shards --out /runs/semmae
    Hardware: 8 GPUs of 80 GB, or more with --micro-batch.
    Hours: not yet measured by us.
    Expect: on ImageNet, fine-tuned 83.34, linear probe 65.0 (the paper); not yet run by us.
    """
    return {}


def semmae_b8_foreground(set_: SetShape) -> Settings:
    """SemMAE's ViT-B/8 on the quarter of the patches that is best in foreground (arXiv:2206.10207).

    Command: torchrun --nproc-per-node 8 -m pipeline pretrain --preset semmae-b8-foreground --data /data/shards \\
        --out /runs/semmae-b8
    Hardware: 8 GPUs of 80 GB, or more with --micro-batch.
    Hours: not yet measured by us.
    Expect: on ImageNet, fine-tuned 84.5, linear probe on the kept tokens 68.7 (the paper); not yet run by us.
    """
    return {"patch": 8, "keep_share": 0.25}


def colormae_b16(set_: SetShape) -> Settings:
    """ColorMAE's ViT-B/16 (arXiv:2407.13036): green noise, random resized crops; no labels are read.

    Command: torchrun --nproc-per-node 8 -m pipeline pretrain --preset colormae-b16 --data /data/shards \\
        --out /runs/colormae
    Hardware: 8 GPUs of 80 GB, or more with --micro-batch.
    Hours: not yet measured by us.
    Expect: on ImageNet, fine-tuned 83.61, and 83.01 after 300 epochs, 83.77 after 1,600, all with --warmup-epochs 40
        (the paper); ADE20K 49.18. Not yet run by us.
    """
    return {"masking": "color-noise", "crop_scale": 0.2}


def automae_b16(set_: SetShape) -> Settings:
    """AutoMAE's ViT-B/16 (arXiv:2303.06583): a generator over the attention of an MAE of 800 epochs, which the set must
    hold (`extract --attention`, with an MAE as the encoder).

    Command: torchrun --nproc-per-node 8 -m pipeline pretrain --preset automae-b16 --data /data/shards \\
        --out /runs/automae
    Hardware: 8 GPUs of 80 GB, or more with --micro-batch.
    Hours: not yet measured by us.
    Expect: on ImageNet, fine-tuned 83.32, linear probe 66.7 (the authors' code); not yet run by us.
    """
    return {"masking": "automae", "crop_scale": 0.2}


def hpm_b16(set_: SetShape) -> Settings:
    """HPM's ViT-B/16 (arXiv:2304.05919): patches whose loss is predicted to be high; raw pixels, random resized crops,
    a batch of 2,048, as in the authors' command. No labels are read.

    Command: torchrun --nproc-per-node 8 -m pipeline pretrain --preset hpm-b16 --data /data/shards --out /runs/hpm
    Hardware: 8 GPUs of 80 GB, or more with --micro-batch.
    Hours: not yet measured by us.
    Expect: on ImageNet, fine-tuned 84.2, and 83.0 with --epochs 200 --warmup-epochs 40, where MAE has 82.2 (the paper);
        ADE20K 48.5. Not yet run by us.
    """
    return {"masking": "hpm", "crop_scale": 0.2, "norm_pix_loss": False, "batch_size": 2048}


PRESETS: dict[str, Callable[[SetShape], Settings]] = {
    "tiny": tiny,
    "small": small,
    "mae-b16": mae_b16,
    "semmae-b16": semmae_b16,
    "semmae-b8-foreground": semmae_b8_foreground,
    "colormae-b16": colormae_b16,
    "automae-b16": automae_b16,
    "hpm-b16": hpm_b16,
}


def settled(asked: Settings, run: StreamRun, *, cuda: bool, main: bool = True) -> PretrainConfig:
    """The config of a pretraining: what was asked for, then what its run folder began with, then its preset, then what
    follows from the set and the machine. Another number of epochs keeps the share of them that is warm-up.

    Every rank finds the same: the choice depends on the set, and on whether there is a GPU.

    Args:
        asked: Fields of PretrainConfig but `run`; None where nothing was asked.
        main: Say on stderr what was chosen.

    Raises:
        ValueError: A setting is out of its range, the preset fixes another value, or the folder cannot be written.
        FileNotFoundError, ShardError: See `ShardSet.open`.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    refuse_out_of_range(given)  # before anything of the set is read
    if main and not (run.out / "DONE.json").is_file():
        refuse_unwritable(run.out)
    begun = _begun(run.out)
    if begun:
        return PretrainConfig(**(begun | given), run=run)
    bytes_ = int(run.cache_gb * 1e9)
    with ShardSet.open(given["data"], labels=given.get("labels"), cache=run.cache, cache_bytes=bytes_) as shards:
        set_ = SetShape(len(shards), shards.size, shards.grid)
    name = given.get("preset") or fitting(set_, cuda=cuda)
    chosen = defaults() | PRESETS[name](set_)
    if "preset" in given:
        _refuse_contradictions(name, chosen, given)
    else:
        chosen["patch"] = patch_of(set_)
    if "epochs" in given:
        chosen["warmup_epochs"] *= given["epochs"] / chosen["epochs"]
    if main and "preset" not in given:
        _say(name, "a GPU" if cuda else "no GPU", set_, chosen | given)
    return PretrainConfig(**(chosen | given), run=run)


def fitting(set_: SetShape, *, cuda: bool) -> str:
    """The preset whose model and schedule fit a set of this shape on a machine with or without a GPU."""
    if not cuda:
        return "tiny"
    return "small" if set_.images < LARGE else "semmae-b16"


def patch_of(set_: SetShape) -> int:
    """The largest patch, up to 16 pixels, that cuts the images into eight or more a side. Where there is none, the
    finest. Patches that cut no label cell are preferred.

    Raises:
        ValueError: No patch of two pixels or more cuts the images evenly.
    """
    patches = [patch for patch in range(2, set_.size // 2 + 1) if set_.size % patch == 0]
    if not patches:
        raise ValueError(f"no patch cuts images of {set_.size} px evenly; extract with another --size")
    fit = [patch for patch in patches if set_.grid % (set_.size // patch) == 0] or patches
    return max((patch for patch in fit if patch <= 16 and set_.size // patch >= 8), default=min(fit))


def defaults() -> Settings:
    """What a PretrainConfig says of METHOD and FREE when nobody says anything."""
    return {one.name: one.default for one in fields(PretrainConfig) if one.name in METHOD + FREE}


def _begun(out: Path) -> Settings:
    """The settings of the pretraining that has begun in this folder; nothing where nothing was computed yet.

    Ranks that come late find the same: nothing is computed before all of them have read this.
    """
    if not (out / "config.json").is_file() or untouched(out):
        return {}
    written = read_json(out / "config.json")
    if written.get("verb") != PretrainConfig.__name__:
        return {}
    names = {one.name for one in fields(PretrainConfig)} - {"run"}
    return {name: value for name, value in written.items() if name in names}


def _refuse_contradictions(name: str, fixed: Settings, given: Settings) -> None:
    for field in METHOD:
        if field in given and given[field] != fixed[field]:
            flag = "--" + field.replace("_", "-")
            raise ValueError(
                f"--preset {name} fixes {flag} {fixed[field]}, and {flag} {given[field]} was asked for beside it; drop "
                "one of the two"
            )


def _say(name: str, why: str, set_: SetShape, chosen: Settings) -> None:
    steps = math.ceil(chosen["epochs"] * set_.images / chosen["batch_size"])
    print(
        f"{set_.images:,} images of {set_.size} px and {why}: the model of --preset {name} ({chosen['depth']} blocks, "
        f"{chosen['embed_dim']} wide, patch {chosen['patch']}), {chosen['epochs']} epochs in batches of "
        f"{chosen['batch_size']}, {steps:,} steps; flags change it, and this folder keeps it",
        file=sys.stderr,
    )
