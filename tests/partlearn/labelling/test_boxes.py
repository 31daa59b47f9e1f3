"""`extract --boxes`: one part, inside the boxes that people drew, and a pretraining that masks more of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from some_inputs import TINY

from partlearn.config import ExtractConfig
from partlearn.labelling.truth import depth_rank
from pipeline.config import VerifyConfig
from pipeline.extract import extract
from pipeline.verify import verify as verify_verb
from pretrain.config import PretrainConfig, StreamRun
from pretrain.train import Pretraining
from shards.shard_set import ShardSet
from shards.verify import verify
from training.config import RunConfig

SIZES = {"wide/0.jpg": (60, 30), "wide/1.jpg": (40, 40), "high/0.jpg": (20, 36)}
BOXES = (
    "train/wide/0.jpg 0 0 29 29\ntrain/wide/1.jpg 10 20 29 39\ntrain/wide/1.jpg 0 0 4 4\ntrain/high/0.jpg 0 8 9 16\n"
)
INSIDE = {
    "wide/0.jpg": [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],  # its middle is 15 to 44
    "wide/1.jpg": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1]],  # a quarter of a cell is no majority
    "high/0.jpg": [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],  # 8 to 27 of 36
}
"""Label of each of 4 x 4 cells of the middle square: 0 inside, 1 outside."""


@pytest.fixture
def images(tmp_path) -> Path:
    for name, size in SIZES.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "train" / name)
    (tmp_path / "boxes.txt").write_text(BOXES)
    return tmp_path / "train"


def config(folder: Path, out: str, **changes) -> ExtractConfig:
    run = RunConfig(out=folder.parent / out, device="cpu", precision="fp32")
    own = {"images": str(folder), "boxes": folder.parent / "boxes.txt", "size": 32, "grid": 4, "backend": "local"}
    return ExtractConfig(run=run, **own | changes)


def stored(images: Path, out: str) -> dict[str, list[list[int]]]:
    with ShardSet.open(images.parent / out) as shards:
        assert shards.background == 1
        samples = [shards.read(index) for index in range(len(shards))]
        assert all(np.array_equal(one.fgrank, depth_rank(one.parts == 0)) for one in samples)
        return {name: one.parts.tolist() for name, one in zip(shards.sources, samples, strict=True)}


def test_what_was_cut_from_an_image_has_the_boxes_where_they_were(images):
    info = extract(config(images, "out"))

    assert stored(images, "out") == INSIDE
    assert (info["groups"], info["producer"]["labels"]["truth"]) == (2, str(images.parent / "boxes.txt"))
    assert verify(images.parent / "out", "deep") == []


def test_boxes_over_a_finished_set_are_the_same_and_a_lost_shard_is_made_again(images, capsys):
    (images.parent / "boxes.txt").write_text(BOXES + "val/9.jpg 0 0 1 1\n")
    extract(config(images, "base"))
    extract(config(images, "labels", images=None, relabel=images.parent / "base"))
    tar = images.parent / "labels/shards/000000.tar"
    before = tar.read_bytes()

    tar.write_bytes(before[:-700])
    verify_verb(VerifyConfig(data=images.parent / "labels", repair=True))

    assert tar.read_bytes() == before
    with ShardSet.open(images.parent / "base", labels=images.parent / "labels") as shards:
        parts = {name: shards.read(index).parts.tolist() for index, name in enumerate(shards.sources)}
    assert parts == INSIDE
    assert "boxes.txt has boxes of 1 images that are not among these; they are not used" in capsys.readouterr().err


def test_boxes_that_changed_meanwhile_are_another_plan(images):
    extract(config(images, "out"))
    (images.parent / "boxes.txt").write_text(BOXES.replace("29 29", "29 28"))

    with pytest.raises(ValueError, match=r"other part maps .* or --boxes"):
        extract(config(images, "out"))


def test_pretraining_masks_more_inside_the_boxes(images):
    """Odds of 1,000 to 1, and fewer patches to mask than are inside: none is outside."""
    extract(config(images, "base", boxes=None, parts=Path("grid"), encoder="random:vit_tiny_patch16_224"))
    extract(config(images, "labels", images=None, relabel=images.parent / "base"))
    run = StreamRun(out=images.parent / "run", device="cpu", precision="fp32")
    settings = PretrainConfig(
        data=str(images.parent / "base"), labels=str(images.parent / "labels"), masking="foreground", flip=False,
        foreground_odds=1000, mask_ratio=0.25, batch_size=3, epochs=1, warmup_epochs=0, run=run, **TINY
    )  # fmt: skip
    with ShardSet.open(settings.data, labels=settings.labels) as shards:
        names, task = shards.sources, Pretraining(settings, shards)
        task.open(0)
        task.read(0)
        list(task.losses(0))
        task.close()

    for image, masked in zip(task.inputs.batch.indices, task.masked.ids_masked.tolist(), strict=True):
        assert len(masked) == 4
        assert sum(np.ravel(INSIDE[names[image]])[masked]) == 0


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"parts": Path("heads")}, "--boxes are the parts, and --parts heads names others"),
        ({"attention": True}, "--boxes looks through no encoder .*; leave out --attention"),
        ({"encoder": "random:vit"}, "--boxes looks through no encoder"),
        ({"num_parts": 3}, "--boxes looks through no encoder"),
    ],
)
def test_what_would_name_other_parts_is_refused(option, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        config(tmp_path, "out", **option)
