"""The verb `encoder` on several ranks: the weights of one process, and one writer."""

import json

import pytest
import torch
import warm
from stripes import TINY, draw_stripes, tiny

from encoders.distill.crops import sample_crops
from encoders.distill.train import distill
from shards.image_batches import ImageBatches
from shards.images import list_images
from training.checkpoint import find, load_state, load_tensors, newest
from training.metrics import read_metrics

STEPS = 3
SETTINGS = TINY | {"warmup_epochs": 0, "epochs": 2}
SCRIPT = """
import sys
from pathlib import Path
import torch
import warm
from stripes import tiny
from encoders.distill.train import distill
from training import distributed
torch.set_num_threads(1)
images, out, settings = sys.argv[1], Path(sys.argv[2]), eval(sys.argv[3])
distributed.join("cpu")
distill(tiny(images, out / "alone", **settings), stop_after_steps=3)
taught = tiny(images, out / "taught", **settings, teacher=f"run:{out / 'teacher'}")
distill(taught, stop_after_steps=3)
distill(tiny(images, out / "finished", **settings | {"epochs": 1, "knn": sys.argv[4]}))
try:
    distill(tiny(images, out / "odd", **settings | {"batch_size": 15}))
except ValueError as error:
    (out / f"odd-{distributed.rank()}.txt").write_text(str(error))
distributed.leave()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same runs by one process and by two; 40 images, one of them unreadable."""
    threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    images = draw_stripes(folder / "images", 40)
    for seed, name in enumerate(("a", "b")):
        draw_stripes(folder / "classes" / name, 12, seed=seed)
    (folder / "images/7.png").write_bytes(b"no image")
    for name in ("one", "two"):
        distill(tiny(images, folder / name / "teacher", epochs=0, embed_dim=48, heads=3))
    distill(tiny(images, folder / "one/alone", **SETTINGS), stop_after_steps=STEPS)
    distill(
        tiny(images, folder / "one/taught", **SETTINGS, teacher=f"run:{folder / 'one/teacher'}"), stop_after_steps=STEPS
    )
    distill(tiny(images, folder / "one/finished", **SETTINGS | {"epochs": 1, "knn": str(folder / "classes")}))
    (folder / "rank.py").write_text(SCRIPT)
    arguments = [folder / "rank.py", images, folder / "two", repr(SETTINGS), folder / "classes"]
    for rank in warm.ranks(2, *arguments):
        done = rank.finished()
        assert done.returncode == 0, done.stderr[-3000:]
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("run", ["alone", "taught"])
def test_two_ranks_equal_one_on_the_joined_batch(run, runs):
    """But for two biases whose gradient is nothing but rounding, which Adam blows up to a whole step: a key's, which
    softmax takes away, and the final norm's in self-distillation, which the head's batch norm takes away."""
    one, two = (load_tensors(find(runs / ranks / run))[0] for ranks in ("one", "two"))
    rest, same = (load_state(newest(runs / ranks / run))["rest"] for ranks in ("one", "two"))

    for name, expected in (one | rest).items():
        if name == "_extra_state" or (run == "alone" and name.endswith("norm.bias") and "blocks" not in name):
            continue
        difference = ((two | same)[name] - expected).abs()
        if name.endswith("qkv.bias"):
            difference = difference.unflatten(0, (3, -1))[[0, 2]]
        assert difference.max().item() < 1e-5, name


@pytest.mark.parametrize("run", ["alone", "taught"])
def test_two_ranks_log_the_figures_of_one(run, runs):
    one, two = (read_metrics(runs / ranks / run) for ranks in ("one", "two"))

    assert len(one) == len(two) == STEPS
    for alone, shared in zip(one, two, strict=True):
        for name in alone.keys() - {"images_per_second", "waiting"}:
            assert shared[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


def test_a_finished_run_of_two_ranks_reports_as_one(runs):
    reports = [json.loads((runs / ranks / "finished/DONE.json").read_text()) for ranks in ("one", "two")]

    assert reports[0]["unreadable"] == reports[1]["unreadable"] == 1
    assert reports[0]["steps"] == reports[1]["steps"] == 2
    assert reports[0]["knn"] == pytest.approx(reports[1]["knn"], abs=0.1)
    assert reports[0]["images_digest"] == reports[1]["images_digest"]


def test_a_batch_that_two_ranks_cannot_share_is_refused_on_both(runs):
    told = {(runs / f"two/odd-{rank}.txt").read_text() for rank in range(2)}

    assert told == {"--batch-size 15 cannot be shared by 2 ranks; choose a multiple"}


def test_the_blocks_of_the_ranks_are_the_crops_of_one(tmp_path):
    config = tiny(draw_stripes(tmp_path / "images", 12), tmp_path, batch_size=12)
    listed = list_images(config.images)
    parts = []
    for rank, ranks in ((0, 1), (0, 3), (1, 3), (2, 3)):
        block = {"rank": rank, "world_size": ranks}
        with ImageBatches(listed, size=16, batch_size=12, seed=0, **block) as batches:
            images, _ = next(iter(batches))
        parts.append(sample_crops(images, config, step=5, **block))

    for name in ("global_crops", "local_crops", "masks"):
        whole, *blocks = (getattr(crops, name).unflatten(0, (2, -1)) for crops in parts)
        assert torch.equal(whole, torch.cat(blocks, dim=1))
