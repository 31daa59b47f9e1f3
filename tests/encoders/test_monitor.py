"""k-NN while an encoder is trained: the figure, the images, and that it changes nothing."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from stripes import draw_stripes, tiny

from encoders import monitor
from encoders.distill.train import distill, new_objective
from encoders.monitor import Monitor, knn_accuracy
from training.checkpoint import find
from training.metrics import read_metrics

COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 30, 20)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def paint(folder, *, colours, each=24):
    """Class folders of plain images with noise; `colours(class, number)` is an image's colour."""
    rng = np.random.default_rng(0)
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(rng.normal(colours(name, number), 12, (24, 20, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03d}.png")
    return str(folder)


def slow_accuracy(tokens, labels, neighbours, temperature):
    right = 0
    for i, token in enumerate(tokens):
        others = [(float(torch.cosine_similarity(token, other, dim=0)), labels[j])
                  for j, other in enumerate(tokens) if j != i]  # fmt: skip
        votes = {}
        for cosine, label in sorted(others, reverse=True)[:neighbours]:
            votes[label] = votes.get(label, 0) + math.exp((cosine - 1) / temperature)
        right += max(votes, key=votes.get) == labels[i]
    return right / len(tokens)


def test_the_accuracy_is_that_of_a_loop_over_images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (60,), generator=generator)
    tokens = torch.randn(60, 5, generator=generator) + torch.eye(4, 5)[labels]

    found = knn_accuracy(tokens, labels, neighbours=7, temperature=0.1)

    assert found == pytest.approx(slow_accuracy(tokens, labels.tolist(), 7, 0.1))
    assert 0.3 < found < 1


def test_an_image_does_not_vote_for_itself():
    tokens = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])

    pairs, crossed = (
        knn_accuracy(tokens, torch.tensor(labels), neighbours=1) for labels in ([0, 0, 1, 1], [0, 1, 0, 1])
    )

    assert (pairs, crossed) == (1.0, 0.0)


def test_classes_of_a_colour_each_are_told_and_classes_of_all_colours_are_not(tmp_path):
    encoder = new_objective(tiny("unused", tmp_path)).encoder
    of_class = paint(tmp_path / "told", colours=lambda name, _: COLOURS[name])
    of_number = paint(tmp_path / "mixed", colours=lambda _, number: list(COLOURS.values())[number % 3])

    told, mixed = (Monitor(folder, size=16, threads=1)(encoder, "fp32") for folder in (of_class, of_number))

    assert told == 1.0
    assert mixed < 0.6


def test_too_many_images_are_thinned_evenly_and_said(tmp_path, monkeypatch, capsys):
    folder = paint(tmp_path / "set", colours=lambda name, _: COLOURS[name], each=20)
    monkeypatch.setattr(monitor, "MOST", 12)

    taken = Monitor(folder, size=16, threads=2)

    assert taken.labels.bincount().tolist() == [4, 4, 4]
    assert "takes 12 of the 60 images" in capsys.readouterr().err


def test_an_unreadable_image_is_left_out_and_said(tmp_path, capsys):
    folder = paint(tmp_path / "set", colours=lambda name, _: COLOURS[name], each=3)
    (tmp_path / "set/green/001.png").write_bytes(b"no image")

    taken = Monitor(folder, size=16, threads=1)

    assert taken.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert "green/001.png cannot be read" in capsys.readouterr().err


def test_images_without_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a folder of class folders"):
        Monitor(draw_stripes(tmp_path / "flat", 3), size=16, threads=1)


def test_it_measures_every_few_epochs_and_at_the_end_and_changes_nothing(tmp_path):
    folder = paint(tmp_path / "set", colours=lambda name, _: COLOURS[name], each=10)
    watched = {"knn": folder, "knn_epochs": 2, "epochs": 5}
    distill(tiny(folder, tmp_path / "alone", epochs=5))

    report = distill(tiny(folder, tmp_path / "whole", **watched))
    distill(tiny(folder, tmp_path / "halves", **watched), stop_after_steps=4)
    distill(tiny(folder, tmp_path / "halves", **watched))

    whole, halves = (read_metrics(tmp_path / run) for run in ("whole", "halves"))
    assert [line["step"] for line in whole if "knn" in line] == [3, 7, 8]  # 30 images in batches of 16: 9 steps
    assert [line.get("knn") for line in whole] == [line.get("knn") for line in halves]
    assert report["knn"] == whole[-1]["knn"]
    weights = {find(tmp_path / run).read_bytes() for run in ("alone", "whole", "halves")}
    assert len(weights) == 1
