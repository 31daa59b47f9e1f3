"""The verb `learn-parts` on two ranks: the weights of one process, and one writer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import photographs

from training.checkpoint import find, load_tensors
from training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--encoder random:vit_tiny_patch16_224 --grid 4 --num-parts 3 --batch-size 4 --steps 4 --device cpu "
    "--precision fp32"
)
FORMS = {"paper": {"paper": True}, "features": {"balance": 0.0}}
"""The balance of the parts is the one term that is each rank's own."""
LEARN = """
import sys
from pathlib import Path
from partlearn.config import LearnConfig
from partlearn.train import learn
from training.config import RunConfig
run = RunConfig(out=Path(sys.argv[2]), device="cpu", precision="fp32")
encoder, settings = "random:vit_tiny_patch16_224", {"grid": 4, "num_parts": 3, "batch_size": 4, "steps": 4, "crops": 0}
learn(LearnConfig(images=sys.argv[1], encoder=encoder, run=run, **settings, **eval(sys.argv[3])))
"""
ROUNDING = {"paper": ("convs.0.bias", "convs.1.bias"), "features": ()}
"""AdaIN takes those biases away: their gradient is rounding, which Adam blows up to whole steps."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def learn_parts(flags: str, images: Path, out: Path) -> list[str]:
    call = ["-m", "pipeline", "learn-parts", "--images", str(images), "--out", str(out)]
    return [*call, *FLAGS.split(), *flags.split()]


@pytest.mark.parametrize("target", FORMS)
def test_two_ranks_equal_one_on_the_joined_batch(target, tmp_path):
    images, form = photographs(tmp_path / "photos", 6), repr(FORMS[target])
    runs = [warm.python("-c", LEARN, images, tmp_path / "one", form)]
    runs += warm.ranks(2, "-c", LEARN, images, tmp_path / "two", form)
    for run in runs:
        done = run.finished()
        assert done.returncode == 0, done.stderr[-3000:]

    one, two = (load_tensors(find(tmp_path / how))[0] for how in ("one", "two"))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        if not name.endswith(ROUNDING[target]):
            apart = (two[name] - expected).abs()
            assert apart.max() < 3e-4, name  # a gradient near 0 is rounding, and Adam's step of 1e-3 follows its sign
            assert (apart > 5e-5).float().mean() < 1e-3, name
    for alone, shared in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert shared["diversity"] == pytest.approx(alone["diversity"], rel=1e-4)


def test_ranks_that_cannot_share_kept_views_are_refused_before_an_image_is_looked_for(tmp_path):
    done = subprocess.run(
        [*TORCHRUN, *learn_parts("--crops 2", tmp_path / "nowhere", tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
    assert "2 ranks cannot share crops kept in memory (--crops 2); take --crops 0" in done.stderr
