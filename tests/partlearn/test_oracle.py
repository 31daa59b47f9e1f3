"""The machinery is right, whatever the encoder: with tokens that hold the true parts, learned parts are those."""

from pathlib import Path
from typing import Any

import pytest
from oracle import GRID, PARTS, Oracle, painted, read_all

from evaluate.part_quality import ari
from partlearn.config import LearnConfig
from partlearn.learn import learn
from partlearn.learner import load_learner
from training.config import RunConfig


def learned_ari(folder: Path, *, shuffled: bool = False, **changes: Any) -> float:
    """Pooled ARI of the labels inside the true foreground, on pictures as they are."""
    oracle = Oracle(shuffled=shuffled)
    config = LearnConfig(
        images=str(painted(folder / "pictures", 48)),
        encoder="oracle",
        grid=GRID,
        parts=PARTS,
        views=2,
        batch_size=16,
        run=RunConfig(out=folder / "run", device="cpu", precision="fp32"),
        **{"steps": 120} | changes,
    )
    learn(config, encoder=oracle)
    learner, _, _ = load_learner(folder / "run")
    images = read_all(folder / "pictures")
    true = oracle.parts_of(images)
    labels, _ = learner.label(oracle(images))
    return ari(labels[true > 0].numpy(), true[true > 0].numpy())


@pytest.mark.parametrize("init", ["kmeans", "random"])
def test_with_an_oracle_encoder_the_learned_parts_are_the_true_ones(init, tmp_path):
    found = learned_ari(tmp_path, init=init, relative=init == "kmeans", steps=120 if init == "kmeans" else 400)

    assert found >= 0.7


def test_with_shuffled_features_they_are_not(tmp_path):
    assert learned_ari(tmp_path, shuffled=True) < 0.1
