"""From images and an encoder to rows on disk."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate.config import KnnConfig, ProbeConfig
from evaluate.data import CENTRE_CROP, STORED, held_out, load_split
from evaluate.features import train_and_test
from evaluate.knn import knn
from evaluate.linear import probe
from evaluate.result import Result, append_results, results_path
from pipeline.cli import main
from shards.atomic import sha256_file
from shards.images import list_images
from training.checkpoint import find, save

FIELDS = "protocol metric value checkpoint checkpoint_sha256 config_sha256 data_fingerprint seed epochs versions time "
FIELDS += "settings preparation tokens pool"
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}


@pytest.fixture
def checkpoint(tmp_path):
    """A run folder with one checkpoint of a tiny random ViT."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(num_classes=0, **VIT)
    vit = VIT | {"mean": [0.5] * 3, "std": [0.25] * 3, "source": "test"}
    run = tmp_path / "run"
    save(run, 1, model.state_dict(), metadata={"vit": vit}, state={})
    (run / "config.json").write_text("{}")
    return run


@pytest.fixture
def photos(tmp_path):
    """Two classes, red and blue, six images each."""
    folder = tmp_path / "photos"
    for number in range(12):
        place = folder / ("red", "blue")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 60, (40, 52, 3))
        pixels[..., 2 * (number % 2)] += 180
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return folder


def a_row(number: int) -> Result:
    hashes = dict.fromkeys(("checkpoint_sha256", "config_sha256", "data_fingerprint"), "0")
    return Result(
        protocol="knn",
        metric="top1",
        value=float(number),
        checkpoint="c",
        settings={},
        preparation="p",
        tokens="full",
        pool="class",
        seed=0,
        epochs=0,
        versions={},
        time="t",
        **hashes,
    )


def test_knn_and_probe_write_exactly_the_interfaces_fields(checkpoint, photos, tmp_path):
    json_file = tmp_path / "new" / "rows.json"
    where = {"checkpoint": str(checkpoint), "images": str(photos), "device": "cpu", "json": json_file}

    rows = knn(KnnConfig(pool="mean", **where))
    told = json.loads(json_file.read_text())
    rows += probe(ProbeConfig(pool="mean", epochs=5, warmup_epochs=1, **where))

    lines = [json.loads(line) for line in (checkpoint / "results.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [set(FIELDS.split())] * 2
    assert told == lines[:1]
    assert [line["value"] for line in lines] == [row.value for row in rows]
    found = [(line["protocol"], line["metric"], line["epochs"]) for line in lines]
    assert found == [("knn", "top1", 0), ("probe", "top1", 5)]
    assert rows[0].value == 100
    assert lines[0]["checkpoint_sha256"] == lines[1]["checkpoint_sha256"]
    assert lines[0]["config_sha256"] != lines[1]["config_sha256"]
    assert {(line["tokens"], line["pool"], line["preparation"]) for line in lines} == {("full", "mean", CENTRE_CROP)}
    settings = {"neighbours": 20, "temperature": 0.07, "pool": "mean", "tokens": "full", "size": 32}
    assert lines[0]["settings"] == settings | {"keep_share": None, "preparation": CENTRE_CROP}


def test_rows_of_other_preparations_tokens_or_pools_have_other_hashes(checkpoint, photos, make_shards, tmp_path):
    where = {"checkpoint": str(checkpoint), "device": "cpu", "out": tmp_path}
    data = str(make_shards(count=20).path)

    rows = [
        *knn(KnnConfig(images=str(photos), **where)),
        *knn(KnnConfig(data=data, **where)),
        *knn(KnnConfig(data=data, pool="mean", **where)),
        *knn(KnnConfig(data=data, tokens="kept", keep_share=0.25, **where)),
        *knn(KnnConfig(data=data, tokens="kept", keep_share=0.5, **where)),
    ]

    assert len({row.config_sha256 for row in rows}) == len(rows)
    assert [row.preparation for row in rows] == [CENTRE_CROP, *[STORED] * 4]
    assert [(row.tokens, row.pool, row.settings["keep_share"]) for row in rows[1:]] == [
        ("full", "class", None),
        ("full", "mean", None),
        ("kept", "class", 0.25),
        ("kept", "class", 0.5),
    ]


def test_rows_name_the_file_of_weights_and_the_images_by_their_digests(checkpoint, photos, tmp_path):
    (row, *_) = knn(KnnConfig(checkpoint=str(checkpoint), images=str(photos), device="cpu", out=tmp_path))

    assert row.checkpoint_sha256 == sha256_file(find(checkpoint))
    assert row.data_fingerprint == list_images(photos).digest


def test_the_hash_of_the_settings_knows_no_paths_and_no_speed(checkpoint, photos, tmp_path):
    where = {"checkpoint": str(checkpoint), "images": str(photos), "device": "cpu", "out": tmp_path / "a"}

    first = knn(KnnConfig(**where))[0]
    faster = knn(KnnConfig(**where | {"threads": 1, "batch_size": 5, "out": tmp_path / "b", "seed": 3}))[0]
    other = knn(KnnConfig(neighbours=3, **where))[0]

    assert first.config_sha256 == faster.config_sha256 != other.config_sha256


def test_rows_that_cannot_be_kept_are_told_before_the_work_and_printed_all_the_same(checkpoint, photos, capsys):
    """As in a colleague's run; a folder in the way stands for rights that root does not lack."""
    (checkpoint / "results.jsonl").mkdir()
    call = ["knn", "--checkpoint", str(checkpoint), "--images", str(photos), "--device", "cpu", "--pool", "mean"]

    code = main(call)

    told = capsys.readouterr()
    assert code == 1
    assert "100.0000" in told.out
    assert re.match(r"warning: .*results\.jsonl will not have the rows .*--out FOLDER keeps them", told.err)
    assert re.search(r"semmae: the rows could not be kept in .*results\.jsonl .*--out FOLDER", told.err)


def test_rows_asked_for_as_json_are_kept_there_where_the_run_takes_none(checkpoint, photos, tmp_path):
    (checkpoint / "results.jsonl").mkdir()
    where = {"checkpoint": str(checkpoint), "images": str(photos), "device": "cpu"}

    rows = knn(KnnConfig(json=tmp_path / "rows.json", **where))

    assert [row["value"] for row in json.loads((tmp_path / "rows.json").read_text())] == [row.value for row in rows]


@pytest.mark.parametrize("protocol", [(knn, KnnConfig), (probe, ProbeConfig)])
@pytest.mark.parametrize("flag", ["out", "json"])
def test_a_place_that_was_asked_for_and_cannot_be_written_is_refused_before_the_work(protocol, flag, tmp_path):
    (tmp_path / "file").touch()
    evaluate, config = protocol

    with pytest.raises(ValueError, match=rf"--{flag} .*file/rows.* needs a folder"):
        evaluate(config(checkpoint="no-such-run", images="no-such-images", **{flag: tmp_path / "file/rows/x"}))


def test_a_shard_set_is_split_by_its_order_and_keeps_its_classes(checkpoint, make_shards, tmp_path):
    shards = make_shards(count=24)

    found = train_and_test(KnnConfig(checkpoint=str(checkpoint), data=str(shards.path), device="cpu", out=tmp_path))

    held = held_out(24, seed=0)
    assert found.data_fingerprint == shards.fingerprint
    assert found.test_labels.tolist() == shards.class_ids[held.numpy()].tolist()
    assert found.train_labels.tolist() == shards.class_ids[~held.numpy()].tolist()


def test_a_test_split_is_matched_by_class_names(checkpoint, photos, tmp_path):
    test = tmp_path / "test"
    for name in ("red", "blue"):
        (test / name).mkdir(parents=True)
        next((photos / name).iterdir()).rename(test / name / "image.png")
    where = {"checkpoint": str(checkpoint), "images": str(photos), "device": "cpu", "pool": "mean"}

    found = train_and_test(KnnConfig(val_images=str(test), **where))

    assert (len(found.train), len(found.test)) == (10, 2)
    (test / "red").rename(test / "green")
    with pytest.raises(ValueError, match=r"lacks \(green\)"):
        train_and_test(KnnConfig(val_images=str(test), **where))


def test_images_without_classes_are_refused(photos, make_shards):
    with pytest.raises(ValueError, match="have no class"):
        load_split("", str(photos / "red"))
    with pytest.raises(ValueError, match="have no class"):
        load_split(str(make_shards(count=4, classes=0).path), "")


def test_every_fifth_image_is_held_out_whatever_the_order():
    held = held_out(50, seed=1)

    assert held.sum() == 10
    assert torch.equal(held, held_out(50, seed=1))
    assert not torch.equal(held, held_out(50, seed=2))
    with pytest.raises(ValueError, match="at least 5 images, got 4"):
        held_out(4, seed=0)


def test_rows_are_added_whole_and_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    append_results(path, [a_row(0), a_row(1)])
    with open(path, "a") as file:
        file.write('{"protocol": "kn')

    append_results(path, [a_row(2)])

    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_full_disk_leaves_the_rows_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    append_results(path, [a_row(0)])
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(OSError, match="no space"):
        append_results(path, [a_row(1)])
    assert path.read_bytes() == before


def test_results_lie_in_the_run_that_was_scored(checkpoint, tmp_path):
    step = checkpoint / "checkpoints" / "step-00000001"

    for path in (checkpoint, step, step / "model.safetensors"):
        assert results_path(str(path), None) == checkpoint / "results.jsonl"
    assert results_path(str(checkpoint), tmp_path) == tmp_path / "results.jsonl"
    assert str(results_path("", None)) == "runs/results.jsonl"
