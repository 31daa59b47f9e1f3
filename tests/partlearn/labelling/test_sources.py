"""Slices: what a builder of one shard is sent, whatever the set's size."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partlearn.config import ExtractConfig
from partlearn.labelling.protocol import folder_of, open_labeller
from partlearn.labelling.sources import Stored, open_source
from partlearn.labelling.truth import TruthLabeller
from training.config import RunConfig

PER_SHARD = 2048


def test_a_builder_is_sent_its_slice_and_nothing_that_grows_with_the_set(tmp_path):
    sizes = []
    for count in (2 * PER_SHARD, 20 * PER_SHARD):
        names = tmp_path / f"{count}.txt"
        names.write_text(
            "".join(f"s3://bucket/train/n{i % 1000:08d}/n{i:08d}.JPEG\t{i % 1000}\n" for i in range(count))
        )
        source = open_source(str(names), None, size=224, quality=90, samples_per_shard=PER_SHARD, seed=0)
        sizes.append(len(pickle.dumps(source.slice(1))))
        assert len(source.slice(1).loads()) == PER_SHARD

    assert sizes[1] < 1.1 * sizes[0] < 500_000


def test_images_are_stored_at_the_quality_and_size_asked_for(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    sizes = []
    for quality in (20, 95):
        source = open_source(str(tmp_path), None, size=40, quality=quality, samples_per_shard=4, seed=0)
        stored = source.slice(0).loads()[0]()
        assert isinstance(stored, Stored)
        assert stored.pixels.shape == (40, 40, 3)
        sizes.append(len(stored.jpeg))

    assert 2 * sizes[0] < sizes[1]


@pytest.mark.parametrize("parts", ["heads", "shuffled-kmeans-image", "truth", "builtin"])
def test_a_name_is_no_folder(parts):
    assert folder_of(parts) is None
    assert folder_of(Path("runs") / parts) == Path("runs") / parts


def of_truth(out: Path) -> ExtractConfig:
    return ExtractConfig(images="x", parts=Path("truth"), grid=4, run=RunConfig(out=out, device="cpu"))


def test_truth_needs_its_images(tmp_path):
    with pytest.raises(ValueError, match="--parts truth needs the images that its maps are beside"):
        open_labeller(of_truth(tmp_path))


def test_what_goes_to_an_actor_as_it_is_holds_no_list_of_names(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    sizes = []
    for count in (3, 60):
        for number in range(count):
            Image.new("RGB", (32, 32)).save(tmp_path / f"images/{number}.jpg")
            Image.new("L", (32, 32), 255).save(tmp_path / f"masks/{number}.png")
        source = open_source(str(tmp_path), None, size=32, quality=90, samples_per_shard=4, seed=0)
        labeller = open_labeller(of_truth(tmp_path), source)
        assert isinstance(labeller, TruthLabeller)
        assert labeller.portable
        sizes.append(len(pickle.dumps((of_truth(tmp_path), labeller))))

    assert sizes[0] == sizes[1]
