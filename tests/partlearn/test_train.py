"""The part learner's loop and its labels."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import photographs

from encoders.frozen import Encoder
from encoders.load import load_encoder
from partlearn.config import LearnConfig
from partlearn.labelling.learned import open_token_labeller
from partlearn.learner import load_learner
from partlearn.train import learn, new_learner
from training import checkpoint
from training.config import RunConfig
from training.metrics import read_metrics

FROM_HEADS = {
    "target": "pixels", "where": "everywhere", "init": "heads", "softmax": "positions", "relative": False,
    "whiten": 0, "diffusion": 0,
    "background": False, "decoder_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("learn") / "photos", 6)


def config(photos, out, **changes) -> LearnConfig:
    settings = {"grid": 4, "num_parts": 3, "crops": 2, "steps": 6, "batch_size": 4} | changes
    run = RunConfig(out=out, device="cpu", precision="fp32")
    return LearnConfig(images=str(photos), encoder="random:vit_tiny_patch16_224", run=run, **settings)


def weights(run):
    return checkpoint.load_tensors(checkpoint.find(run))[0]


@pytest.mark.parametrize("changes", [{}, {"crops": 0}, FROM_HEADS], ids=["default", "fresh views", "from heads"])
def test_stopping_and_resuming_gives_the_same_weights(changes, photos, tmp_path):
    learn(config(photos, tmp_path / "straight", **changes))

    learn(config(photos, tmp_path / "stopped", **changes), stop_after_steps=3)
    learn(config(photos, tmp_path / "stopped", **changes))

    straight, stopped = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)


@pytest.mark.parametrize("changes", [{}, FROM_HEADS], ids=["default", "from heads"])
def test_training_lowers_what_it_minimises_and_logs_its_health(changes, photos, tmp_path):
    learn(config(photos, tmp_path / "run", **changes | {"steps": 41, "base_lr": 0.64}))

    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"psnr", "diversity", "parts_used", "largest_share", "speckle", "cosine", "area_2"} <= set(lines[-1])


def test_the_kmeans_start_reads_each_of_its_fresh_views_once(photos, tmp_path):
    seen = []

    class Counting(Encoder):
        def __call__(self, images):
            seen.append(len(images))
            return super().__call__(images)

    encoder = load_encoder("random:vit_tiny_patch16_224", grid=4, precision="fp32")
    encoder.__class__ = Counting
    settings = config(photos, tmp_path / "run", steps=0, crops=0, batch_size=6)

    learn(settings, encoder=encoder)

    assert sum(seen) == 6 + 6  # the images of the start, and one batch for the report


@pytest.mark.parametrize(
    ("changes", "read"), [({}, (3, 32)), ({"encoder_block": 1, "whiten": 0}, (1, 0)), ({"paper": True}, (None, 0))]
)
def test_small_is_read_where_it_reads_best_unless_told(changes, read, photos, tmp_path):
    run = RunConfig(out=tmp_path)
    settings = LearnConfig(images=str(photos), encoder="builtin", run=run, **changes)

    assert (settings.encoder_block, settings.whiten) == read


def test_labels_are_parts_inside_and_background_outside(photos, tmp_path):
    learn(config(photos, tmp_path / "run", foreground_share=0.35))
    labeller = open_token_labeller(tmp_path / "run", precision="fp32")

    labels = labeller(np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3)).astype(np.uint8))
    parts, fgrank = labels.parts, labels.fgrank

    assert labeller.groups == 4
    assert parts.shape == (5, 4, 4)
    assert ((parts == 3) == (fgrank >= round(0.35 * 16))).all()
    assert np.array_equal(np.sort(fgrank.reshape(5, -1)), np.tile(np.arange(16), (5, 1)))


def test_tokens_that_are_not_finite_are_not_labelled(photos, tmp_path):
    learn(config(photos, tmp_path / "run"))
    labeller = open_token_labeller(tmp_path / "run")
    with torch.no_grad():
        labeller.encoder.model.patch_embed.proj.bias[0] = torch.inf

    with pytest.raises(FloatingPointError, match="tokens that are not finite"):
        labeller(np.zeros((2, 64, 64, 3), np.uint8))


def test_a_learner_without_a_background_labels_every_cell_with_a_part(photos, tmp_path):
    learn(config(photos, tmp_path / "run", **FROM_HEADS))
    labeller = open_token_labeller(tmp_path / "run")

    parts = labeller(np.zeros((2, 64, 64, 3), np.uint8)).parts

    assert labeller.groups == 3
    assert parts.max() < 3


def test_a_corrupt_image_is_named_once(tmp_path, capsys):
    folder = photographs(tmp_path / "photos", 5)
    (folder / "torn.jpg").write_bytes(b"no image")

    learn(config(folder, tmp_path / "run", crops=0, steps=4))

    assert capsys.readouterr().err.count("torn.jpg cannot be read (not an image") == 1


@pytest.mark.parametrize("name", ["heds", "smal"])
def test_parts_that_are_nowhere_are_told_what_there_is(name):
    with pytest.raises(FileNotFoundError, match=f"no parts at {name}: .* run folder .* builtin, .* baseline .*heads"):
        open_token_labeller(name)


def test_views_that_do_not_fit_in_memory_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="lower --crops"):
        learn(config(photos, tmp_path / "run", crops=10**9))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_parts": 1}, "parts must lie between 2 and 255"),
        ({"foreground_share": 0.0}, "foreground_share must lie in"),
        ({"init": "heads"}, "with it, set relative to False, whiten and diffusion to 0"),
        ({"foreground": "maps"}, "take --paper, or set where to everywhere"),
        ({"target": "pixels", "decoder_size": 9}, "decoder_size must be grid 4 times"),
        ({"encoder_block": 13}, "encoder_block must lie between 0 and 12"),
    ],
)
def test_a_setting_out_of_range_is_a_sentence(changes, sentence, photos, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        learn(config(photos, tmp_path / "run", **changes))


def test_another_grid_than_the_learned_one_is_refused(photos, tmp_path):
    learn(dataclasses.replace(config(photos, tmp_path / "run")))

    with pytest.raises(ValueError, match="was learned on 4"):
        open_token_labeller(tmp_path / "run", grid=8)


def test_heads_that_turn_by_position_cannot_be_the_start(photos, tmp_path):
    chosen = config(photos, tmp_path / "run", **FROM_HEADS)
    rotary = dataclasses.replace(chosen, encoder="random:vit_small_patch16_dinov3_qkvb")

    with pytest.raises(ValueError, match="turn their queries and keys by position"):
        learn(rotary)


@pytest.mark.parametrize(
    "changes", [FROM_HEADS | {"target": "both"}, FROM_HEADS | {"style": "nothing"}, {"consistency": 1.0, "crops": 0}]
)
def test_every_loss_trains_what_it_reaches(changes, photos, tmp_path):
    chosen = config(photos, tmp_path / "run", **changes)

    report = learn(chosen)

    learner, _, _ = load_learner(tmp_path / "run")
    fresh = new_learner(chosen, load_encoder(chosen.encoder, grid=chosen.grid))
    started = fresh.state_dict()
    moved = {name for name, tensor in learner.state_dict().items() if not torch.equal(tensor, started[name])}
    assert any(name.startswith("decoder") for name in moved) == (chosen.target != "features")
    assert ("vectors" in moved) == (chosen.target != "pixels")
    assert "attention.query" in moved
    assert ("unlike" in report) == (chosen.consistency > 0)


def test_a_style_that_may_know_nothing_is_the_same_for_every_image(photos, tmp_path):
    """Its weights on the class token get no gradient: they only decay."""
    for style in ("class", "nothing"):
        learn(config(photos, tmp_path / style, **FROM_HEADS, style=style))

    fresh = new_learner(config(photos, tmp_path, **FROM_HEADS), load_encoder("random:vit_tiny_patch16_224", grid=4))
    name = "decoder.blocks.0.styles.0.style.weight"
    before = fresh.state_dict()[name]
    knowing, blind = ((weights(tmp_path / style)[name] / before).std() for style in ("class", "nothing"))
    assert blind < 1e-5 < knowing


def test_from_the_kmeans_start_no_updates_are_made_unless_asked_for(photos, tmp_path):
    run = RunConfig(out=tmp_path / "run", device="cpu", precision="fp32")
    chosen = LearnConfig(
        images=str(photos), encoder="random:vit_tiny_patch16_224", grid=4, num_parts=3, crops=2, batch_size=4, run=run
    )

    report = learn(chosen)

    assert report["steps"] == 0
    assert {"parts_used", "speckle"} <= set(report)
    (line,) = read_metrics(tmp_path / "run")
    assert line.pop("step") == 0
    assert line == {name: report[name] for name in report if name not in ("steps", "images", "encoder")}
    assert open_token_labeller(tmp_path / "run").groups == 4


def test_a_part_that_vanishes_is_told_of(photos, tmp_path, capsys):
    learn(config(photos, tmp_path / "run", num_parts=40, steps=0))

    told = capsys.readouterr().err
    assert "it has vanished; ask for fewer --num-parts, or read another --encoder-block" in told
    assert "`balance`" not in told


@pytest.mark.parametrize("steps", [0, 14])
def test_a_run_killed_before_its_report_gives_the_same_report_and_warnings(steps, photos, tmp_path, capsys):
    chosen = config(photos, tmp_path / "run", num_parts=20, steps=steps)
    report, told = learn(chosen), capsys.readouterr().err
    lines = read_metrics(tmp_path / "run")
    (tmp_path / "run" / "DONE.json").unlink()

    again = learn(chosen)

    assert again == report
    assert {"parts_used", "area_19"} <= set(report)
    after = capsys.readouterr().err.splitlines(keepends=True)
    assert "".join(line for line in after if "goes on after" not in line) == told
    assert "it has vanished" in told
    assert read_metrics(tmp_path / "run") == lines


def test_more_parts_than_cells_to_start_from_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"k-means of 200 parts needs as many cells, and there are \d+; ask for fewer"):
        learn(config(photographs(tmp_path / "photos", 6), tmp_path / "run", num_parts=200, crops=0, steps=0))
