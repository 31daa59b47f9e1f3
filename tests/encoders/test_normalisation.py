"""Images are normalised by the mean and deviation that the weights were trained with, or the user is told."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import photographs, small_parts
from layouts import forms, metas_registers, small_vit, tiny, under
from safetensors.torch import save_file

from encoders.distill.config import EncoderConfig
from encoders.distill.train import new_objective
from encoders.load import load_encoder
from encoders.normalisation import asked, of_file
from encoders.weights import read_weights
from evaluate.config import KnnConfig
from evaluate.features import open_encoder, train_and_test
from evaluate.result import rows_of
from partlearn.config import ExtractConfig, LearnConfig
from partlearn.labelling.learned import open_token_labeller
from partlearn.labelling.protocol import open_labeller
from partlearn.train import PartLearning
from pipeline.config import ScorePartsConfig
from pipeline.score_parts import _baselines
from pipeline.verify import recorded_config
from training.config import RunConfig

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = (0.48145466, 0.4578275, 0.40821073)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
OURS = {"encoder_mean": MEAN, "encoder_std": STD}
TINY = "random:vit_tiny_patch16_224"
WEIGHTS, OTHER = small_vit(1), small_vit(2)
FORMS = forms(WEIGHTS, OTHER)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("normalisation") / "photos", 8)


@pytest.fixture(scope="module")
def classes(photos):
    for number, file in enumerate(sorted(photos.glob("*.jpg"))):
        place = photos.parent / "classes" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return photos.parent / "classes"


@pytest.fixture(scope="module")
def learned_with_ours(tmp_path_factory):
    return small_parts(tmp_path_factory.mktemp("learned") / "run", steps=0, init="kmeans", **OURS)


def told(path, architecture="vit_tiny_patch16_224"):
    found = of_file(path, read_weights(path), architecture)
    return (found.mean, found.std), found.source


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "form",
    ["DINO", "DINOv2 in training", "DINOv2, to be evaluated", "MoCo v3", "MoCo v3, to be evaluated", "MAE",
     "MAE with its decoder", "MAE, fine-tuned", "DeiT with EMA"],
)  # fmt: skip
def test_files_in_metas_layouts_want_imagenets_whatever_timm_says_of_the_name(form, tmp_path):
    values, source = told(saved(tmp_path / "weights.pth", FORMS[form][0]))

    assert values == IMAGENET
    assert source.startswith("ImageNet's, as in ")


def test_so_do_metas_registers(tmp_path):
    theirs = metas_registers(small_vit(1, reg_tokens=4, no_embed_class=True))

    assert told(saved(tmp_path / "registers.pth", theirs)) == (IMAGENET, "ImageNet's, as in DINOv2")


@pytest.mark.parametrize("form", ["plain", "DDP", "torch.compile", "Lightning, model", "timm with EMA"])
def test_of_other_files_nothing_is_known_and_imagenets_are_a_guess(form, tmp_path):
    assert told(saved(tmp_path / "weights.pth", FORMS[form][0])) == (IMAGENET, "")


def test_the_guess_is_one_line_that_names_the_way_out(tmp_path, capsys):
    file = saved(tmp_path / "mine.pth", tiny())

    encoder = load_encoder(f"timm:vit_tiny_patch16_224={file}", grid=2)

    (line,) = capsys.readouterr().err.splitlines()
    assert encoder.description["mean"] == list(IMAGENET[0])
    assert line.startswith("warning: ")
    assert "mine.pth does not say" in line
    assert "--encoder-mean and --encoder-std" in line
    assert "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k=FILE" in line


def test_a_tag_behind_the_name_says_whose_weights_they_are(tmp_path):
    file = saved(tmp_path / "weights.pth", {"model": WEIGHTS})

    assert told(file, "vit_tiny_patch16_224.augreg_in21k_ft_in1k")[0] == HALF
    assert told(file, "vit_base_patch16_224.mae")[0] == IMAGENET


def test_a_name_that_stands_for_weights_of_one_origin_says_it_too(tmp_path):
    file = saved(tmp_path / "weights.pth", WEIGHTS)

    assert told(file, "vit_small_patch14_dinov2") == (IMAGENET, "timm's vit_small_patch14_dinov2")
    assert told(file, "vit_base_patch16_clip_224")[0][0] == CLIP


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ({"mean": "[0.1, 0.2, 0.3]", "std": "[0.4, 0.5, 0.6]"}, (MEAN, STD)),
        ({"arch": "vit_tiny_patch16_224"}, HALF),
        ({"architecture": "deit_tiny_patch16_224.fb_in1k"}, IMAGENET),
    ],
)
def test_the_header_of_a_safetensors_file_is_believed(header, values, tmp_path):
    save_file(WEIGHTS, tmp_path / "weights.safetensors", metadata=header)

    found, source = told(tmp_path / "weights.safetensors")

    assert found == values
    assert source


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"model": "vit_tiny_patch16_224", "mean": None, "std": None}, HALF),
        ({"model": "vit_tiny_patch16_224", "mean": list(MEAN), "std": list(STD)}, (MEAN, STD)),
        ({"model": "vit_tiny_patch16_224", "lr": 1.0}, IMAGENET),  # another script, which may normalise as it likes
    ],
)
def test_timms_training_saves_what_it_normalised_by(settings, values, tmp_path):
    content = {"arch": "x", "state_dict": WEIGHTS, "args": argparse.Namespace(**settings)}

    assert told(saved(tmp_path / "weights.pth.tar", content))[0] == values


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "config.json",
            {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": MEAN, "std": STD}},
        ),
        ("preprocessor_config.json", {"image_mean": MEAN, "image_std": STD}),
    ],
)
def test_the_settings_that_a_hub_keeps_beside_the_weights_are_read(name, content, tmp_path):
    file = saved(tmp_path / "pytorch_model.bin", WEIGHTS)
    (tmp_path / name).write_text(json.dumps(content))

    assert told(file) == ((MEAN, STD), f"{name} beside it says")


OF_OTHERS = '{"architecture": "convnext_base", "pretrained_cfg": {"mean": [0.1, 0.1, 0.1], "std": [0.1, 0.1, 0.1]}}'


@pytest.mark.parametrize(
    "content", [OF_OTHERS, "{", "[]", "3", '{"pretrained_cfg": {"mean": 3}}', '{"pretrained_cfg": null}']
)
def test_a_config_of_something_else_beside_the_weights_says_nothing(content, tmp_path):
    file = saved(tmp_path / "pytorch_model.bin", WEIGHTS)
    (tmp_path / "config.json").write_text(content)

    assert told(file) == (IMAGENET, "")


def test_what_the_user_says_is_taken_before_all_else(tmp_path, capsys):
    file = saved(tmp_path / "weights.pth", {"teacher": under("backbone.", tiny())})

    encoder = load_encoder(f"timm:vit_tiny_patch16_224.augreg_in21k={file}", grid=2, mean=MEAN, std=STD)

    grey = torch.full((1, 32, 32, 3), 51, dtype=torch.uint8)  # 51 of 255 is .2
    assert torch.allclose(encoder.prepared(grey)[0, :, 0, 0], torch.tensor([0.25, 0.0, -1 / 6]), atol=1e-6)
    assert (encoder.description["mean"], encoder.description["std"]) == (list(MEAN), list(STD))
    assert capsys.readouterr().err.endswith("; mean and deviation: --encoder-mean and --encoder-std\n")


@pytest.mark.parametrize(
    ("mean", "std", "sentence"),
    [
        (MEAN, None, "belong together"),
        (None, STD, "belong together"),
        ((123.7, 116.3, 103.5), STD, r"between 0 and 1 \(255 is 1\), got \(123\.7, "),
        (MEAN, (0.0, 0.5, 0.5), "between 0 and 1"),
        ((0.5,), (0.5,), "three numbers each"),
    ],
)
def test_half_of_it_or_numbers_of_bytes_are_refused(mean, std, sentence):
    with pytest.raises(ValueError, match=sentence):
        asked(mean, std)


def test_a_run_of_ours_knows_its_own_and_takes_no_other():
    with pytest.raises(ValueError, match=r"builtin was trained with mean \(0\.485, .* leave --encoder-mean and"):
        load_encoder("builtin", mean=MEAN, std=STD)
    assert load_encoder("builtin", mean=IMAGENET[0], std=IMAGENET[1], grid=2).description["mean"] == list(IMAGENET[0])


def described(encoder):
    return tuple(encoder.description["mean"]), tuple(encoder.description["std"])


def test_every_verb_hands_it_to_its_encoder(photos, tmp_path):
    run = RunConfig(out=tmp_path / "run", device="cpu", precision="fp32")
    learning = LearnConfig(images=str(photos), encoder=TINY, grid=2, num_parts=2, run=run, **OURS)
    extraction = ExtractConfig(images=str(photos), parts=Path("heads"), encoder=TINY, grid=2, run=run, **OURS)
    student = EncoderConfig(images=str(photos), teacher=TINY, size=32, embed_dim=32, heads=1, depth=1, run=run, **OURS)
    scoring = ScorePartsConfig(images=("x",), parts=("heads",), encoder=(TINY,), grid=2, device="cpu", **OURS)

    encoders = [
        PartLearning(learning).encoder,
        open_labeller(extraction).encoder,
        new_objective(student).teacher,
        next(_baselines(scoring, {"block": 3})).labeller.encoder,
    ]

    assert [described(encoder) for encoder in encoders] == 4 * [(MEAN, STD)]


def test_baselines_beside_a_learner_see_as_it_does():
    scoring = ScorePartsConfig(images=("x",), parts=("heads",), grid=2, device="cpu")

    (method,) = _baselines(scoring, {"source": TINY, "block": 3, "mean": list(MEAN), "std": list(STD)})

    assert described(method.labeller.encoder) == (MEAN, STD)


def test_features_are_computed_with_it_and_the_row_says_so_but_the_protocol_is_the_same(classes):
    settings = {"encoder": TINY, "images": str(classes), "size": 32, "device": "cpu"}
    ours, plain = KnnConfig(**settings, **OURS), KnnConfig(**settings)

    encoder, _ = open_encoder(ours)
    (row,), (other,) = (
        rows_of(one, train_and_test(one), {"top1": 1.0}, protocol="knn", epochs=0, time="") for one in (ours, plain)
    )

    assert described(encoder) == (MEAN, STD)
    assert row.checkpoint == f"{TINY} mean (0.1, 0.2, 0.3) std (0.4, 0.5, 0.6)"
    assert other.checkpoint == TINY
    assert row.config_sha256 == other.config_sha256


def test_labels_of_another_normalisation_are_other_labels():
    one = open_token_labeller("heads", encoder=TINY, grid=2, mean=MEAN, std=STD)
    other = open_token_labeller("heads", encoder=TINY, grid=2)

    assert one.identity["encoder_sha256"] == other.identity["encoder_sha256"]
    assert (one.identity["encoder_mean"], one.identity["encoder_std"]) == (list(MEAN), list(STD))
    assert one.identity != other.identity


def test_parts_are_labelled_with_the_mean_they_were_learned_with(learned_with_ours):
    labeller = open_token_labeller(learned_with_ours)

    assert described(labeller.encoder) == (MEAN, STD)
    with pytest.raises(ValueError, match=r"--encoder-mean \(0\.5, 0\.5, 0\.5\) was asked for, but .* was learned with"):
        open_token_labeller(learned_with_ours, mean=HALF[0], std=HALF[1])
    with pytest.raises(ValueError, match=r"--encoder-std \(0\.5, 0\.5, 0\.5\) was asked for"):
        open_token_labeller(learned_with_ours, mean=MEAN, std=HALF[1])


def test_a_set_is_repaired_with_the_mean_it_was_built_with(tmp_path):
    recorded = {"images": "x", "parts": "heads", "relabel": None, "encoder": TINY,
                "encoder_mean": list(MEAN), "encoder_std": list(STD)}  # fmt: skip

    config = recorded_config({"producer": {"config": recorded, "labels": {}}}, tmp_path)

    assert (config.encoder_mean, config.encoder_std) == (MEAN, STD)


@pytest.mark.parametrize(
    ("config", "settings", "sentence"),
    [
        (ScorePartsConfig, {"images": ("x",)}, "are of the encoders in --encoder"),
        (EncoderConfig, {"images": "x", "run": RunConfig(out=Path("x"))}, "are the teacher's; name it with --teacher"),
        (
            ExtractConfig,
            {"images": "x", "parts": Path("truth"), "run": RunConfig(out=Path("x"))},
            "looks through no encoder",
        ),
    ],
)
def test_where_no_encoder_is_named_it_is_refused(config, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**settings, **OURS)


def test_a_classifier_under_model_alone_may_be_anybodys(tmp_path, capsys):
    """timm's own plain ViTs want 0.5, and are saved so too."""
    weights = tiny() | {"head.weight": torch.zeros(3, 12), "head.bias": torch.zeros(3)}

    load_encoder(f"timm:vit_tiny_patch16_224={saved(tmp_path / 'weights.pth', {'model': under('', weights)})}", grid=2)

    assert "does not say by which mean" in capsys.readouterr().err
