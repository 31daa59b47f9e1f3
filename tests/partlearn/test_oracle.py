"""The machinery is right, whatever the encoder: with tokens that hold the true parts, learned parts are those."""

from pathlib import Path
from typing import Any

import pytest
from oracle import GRID, PARTS, Oracle, painted, read_all

from evaluate.parts.metrics import ari
from partlearn.config import LearnConfig
from partlearn.learner import load_learner
from partlearn.train import learn
from training.config import RunConfig


def learned_ari(folder: Path, *, shuffled: bool = False, **changes: Any) -> float:
    """Pooled ARI of the labels inside the true foreground, on images as they are."""
    oracle = Oracle(shuffled=shuffled)
    config = LearnConfig(
        images=str(painted(folder / "images", 48)),
        encoder="oracle",
        grid=GRID,
        num_parts=PARTS,
        crops=2,
        batch_size=16,
        base_lr=0.016,
        run=RunConfig(out=folder / "run", device="cpu", precision="fp32"),
        **{"steps": 120} | changes,
    )
    learn(config, encoder=oracle)
    learner, _, _ = load_learner(folder / "run")
    images = read_all(folder / "images")
    true = oracle.parts_of(images)
    labels, _ = learner.label(oracle(images))
    return ari(labels[true > 0].numpy(), true[true > 0].numpy())


RAW = {"relative": False, "whiten": 0, "diffusion": 0}


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 120}, {"init": "random", **RAW, "steps": 400}])
def test_with_an_oracle_encoder_the_learned_parts_are_the_true_ones(settings, tmp_path):
    assert learned_ari(tmp_path, **settings) >= 0.7


def test_with_shuffled_features_they_are_not(tmp_path):
    assert learned_ari(tmp_path, shuffled=True) < 0.1
