"""G9: labels made again lie over a set and leave it as it was. And sets that are repaired, to the bytes they had."""

import gc
import io
import shutil
import signal
import tarfile
import time
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import warm
import webdataset
from conftest import photographs, small_parts, tars
from PIL import Image

from partlearn.config import ExtractConfig
from pipeline.config import VerifyConfig
from pipeline.extract import extract
from pipeline.verify import verify as verify_verb
from pretrain.config import PretrainConfig, StreamRun
from pretrain.train import pretrain
from shards.atomic import read_json, sha256_file, write_json
from shards.crops import crop_cells, sample_boxes, sample_flips
from shards.errors import SampleError, ShardError
from shards.shard_set import ShardSet
from shards.stream import Stream
from shards.verify import verify
from training.config import RunConfig

TINY = {
    "patch": 8, "embed_dim": 32, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
    "epochs": 2, "warmup_epochs": 0, "batch_size": 4, "base_lr": 1e-2,
}  # fmt: skip


def settings(out: Path, **changes) -> ExtractConfig:
    run = RunConfig(out=out, device="cpu", precision="fp32")
    return ExtractConfig(**{"batch_size": 4, "backend": "local", "run": run} | changes)


@pytest.fixture(scope="module")
def other_parts(tmp_path_factory) -> Path:
    """A second part learner: other parts, on a finer grid."""
    return small_parts(tmp_path_factory.mktemp("other") / "run", grid=8, num_parts=5, seed=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eleven in two classes, and one that is cut short."""
    folder = tmp_path_factory.mktemp("images")
    photographs(folder / "cat", 6)
    photographs(folder / "dog", 6)
    whole = (folder / "dog/002.jpg").read_bytes()
    (folder / "dog/002.jpg").write_bytes(whole[:200])
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, images, learned) -> Path:
    """A finished set of three shards."""
    out = tmp_path_factory.mktemp("base") / "set"
    extract(settings(out, images=str(images), parts=learned, size=32, samples_per_shard=4))
    return out


@pytest.fixture(scope="module")
def labels(tmp_path_factory, base, other_parts) -> Path:
    """Labels of the other learner over the base, with class attention."""
    out = tmp_path_factory.mktemp("labels") / "set"
    extract(settings(out, relabel=base, parts=other_parts, attention=True))
    return out


@pytest.fixture
def mine(base, tmp_path) -> Path:
    """A copy of the base, to be harmed."""
    return Path(shutil.copytree(base, tmp_path / "mine"))


def state_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and digest of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, sha256_file(path)) for path in files}


def test_g9_a_label_set_is_aligned_with_its_base_and_holds_no_images(base, labels):
    ours, theirs = read_json(base / "dataset.json"), read_json(labels / "dataset.json")

    with ShardSet.open(base) as images, ShardSet.open(labels) as new:
        assert new.keys == images.keys
        assert new.sources == images.sources
        assert np.array_equal(new.class_ids, images.class_ids)
        assert new.shard_sizes.tolist() == images.shard_sizes.tolist()
        assert (new.groups, new.grid, images.groups, images.grid) == (6, 8, 4, 4)
    assert theirs["labels_of"] == ours["fingerprint"]
    assert theirs["fingerprint"] != ours["fingerprint"]
    assert (theirs["size"], theirs["classes"], theirs["rejected"]) == (ours["size"], ours["classes"], 0)
    for tar in sorted((labels / "shards").glob("*.tar")):
        with tarfile.open(tar) as members:
            assert {name.partition(".")[2] for name in members.getnames()} == {"parts.npy", "fgrank.npy", "attn.npy"}
    assert verify(labels, "deep") == []


def test_g6_stock_webdataset_reads_a_label_set(labels):
    urls = [str(path) for path in sorted((labels / "shards").glob("*.tar"))]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its tars to the garbage collector
        stock = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        gc.collect()

    with ShardSet.open(labels) as shards:
        assert [sample["__key__"] for sample in stock] == shards.keys
        for index, sample in enumerate(stock):
            parts, fgrank, attn = shards.read_labels(index, attention=True)
            assert np.array_equal(sample["parts.npy"], parts)
            assert np.array_equal(sample["fgrank.npy"], fgrank)
            assert np.array_equal(sample["attn.npy"], attn)
    keys = pq.read_table(labels / "index.parquet", columns=["key"])["key"].to_pylist()
    assert keys == [sample["__key__"] for sample in stock]


def test_g9_opened_over_its_base_it_gives_the_images_there_and_the_labels_here(base, labels):
    with ShardSet.open(base) as plain, ShardSet.open(labels) as new, ShardSet.open(base, labels=labels) as both:
        assert (both.groups, both.grid, both.size) == (6, 8, 32)
        assert both.identity == f"{plain.fingerprint}+{new.fingerprint}"
        for index in range(len(plain)):
            image, seen = plain.read(index), both.read(index, attention=True)
            parts, fgrank, attn = new.read_labels(index, attention=True)
            assert (seen.jpeg, seen.key, seen.class_id) == (image.jpeg, image.key, image.class_id)
            assert np.array_equal(seen.parts, parts)
            assert np.array_equal(seen.fgrank, fgrank)
            assert np.array_equal(seen.attn, attn)
        assert not all(np.array_equal(plain.read(i).fgrank, both.read(i).fgrank) for i in range(len(plain)))


def test_g9_relabelling_with_the_same_learner_gives_the_labels_it_gave(base, learned, tmp_path):
    """The stored JPEG's own pixels were labelled, so they are found again."""
    extract(settings(tmp_path / "again", relabel=base, parts=learned))

    with ShardSet.open(base) as first, ShardSet.open(base, labels=tmp_path / "again") as again:
        for index in range(len(first)):
            assert np.array_equal(first.read(index).parts, again.read(index).parts)
            assert np.array_equal(first.read(index).fgrank, again.read(index).fgrank)


def test_g9_labels_in_the_set_are_opened_by_name_and_leave_it_as_it_was(mine, learned):
    before = state_of(mine)

    extract(settings(mine / "labels/again", relabel=mine, parts=learned))

    after = state_of(mine)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("labels/again/") for name in after.keys() - before.keys())
    assert verify(mine, "deep") == []
    with ShardSet.open(mine, labels="again") as shards:
        assert shards.labels is not None
        assert shards.labels.path == mine / "labels/again"
        assert len(list(islice(Stream(shards, batch_size=4, seed=0), 3))) == 3


def test_g9_labels_of_another_set_are_refused_before_the_first_batch(labels, images, learned, tmp_path):
    other = tmp_path / "other"
    extract(settings(other, images=str(images / "cat"), parts=learned, size=32, samples_per_shard=4))

    with pytest.raises(ValueError, match=r"the labels in .* belong to the shard set [0-9a-f]{64}, .*extract --relabel"):
        ShardSet.open(other, labels=labels)
    with pytest.raises(ValueError, match="belong to the shard set"):
        pretrain(pretraining(other, tmp_path / "run", labels=str(labels)))


def test_g9_a_whole_set_is_no_label_set_of_another(base, mine):
    with pytest.raises(ValueError, match=r"belong to the shard set .* make labels for it"):
        ShardSet.open(base, labels=mine)


def test_labels_that_are_not_there_are_a_sentence_that_names_those_that_are(base, labels, tmp_path):
    with pytest.raises(FileNotFoundError, match="no labels nowhere: the set has no labels/; make some with"):
        ShardSet.open(base, labels="nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    shutil.copytree(labels, copy / "labels/mine")
    with pytest.raises(FileNotFoundError, match="no labels nowhere: labels/ has mine; make some with"):
        ShardSet.open(copy, labels="nowhere")


def test_labels_alone_cannot_be_streamed_or_relabelled(labels, learned, tmp_path):
    """A label set given where a set with images is meant."""
    with ShardSet.open(labels) as shards, pytest.raises(ValueError, match="holds labels alone"):
        Stream(shards, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="holds labels alone"):
        extract(settings(tmp_path / "out", relabel=labels, parts=learned))


def pretraining(data: Path, out: Path, **changes) -> PretrainConfig:
    run = StreamRun(out=out, device="cpu", precision="fp32")
    return PretrainConfig(data=str(data), run=run, **TINY | changes)


def test_pretraining_takes_the_new_labels_and_resumes_with_no_others(base, labels, tmp_path):
    relabelled, stored = tmp_path / "relabelled", tmp_path / "stored"
    report = pretrain(pretraining(base, relabelled, labels=str(labels)), stop_after_steps=2)
    plain = pretrain(pretraining(base, stored), stop_after_steps=2)

    assert report["steps"] == plain["steps"] == 2
    assert report["data_fingerprint"].startswith(plain["data_fingerprint"] + "+")
    assert report["loss"] != plain["loss"]
    with pytest.raises(ValueError, match="labels was "):
        pretrain(pretraining(base, relabelled), stop_after_steps=3)
    assert pretrain(pretraining(base, relabelled, labels=str(labels)), stop_after_steps=3)["steps"] == 3


def test_s8_a_run_is_not_resumed_on_labels_made_anew_in_the_same_place(base, learned, other_parts, tmp_path):
    named = tmp_path / "labels"
    extract(settings(named, relabel=base, parts=other_parts))
    pretrain(pretraining(base, tmp_path / "run", labels=str(named)), stop_after_steps=2)
    shutil.rmtree(named)
    extract(settings(named, relabel=base, parts=learned))

    with pytest.raises(ValueError, match=r"fed by another stream \(fingerprint was [0-9a-f]{64}\+[0-9a-f]{64}, now"):
        pretrain(pretraining(base, tmp_path / "run", labels=str(named)), stop_after_steps=3)


def test_s7_stored_attention_is_cropped_and_mirrored_with_the_rest(base, labels):
    with ShardSet.open(base, labels=labels) as shards:
        heads = shards.heads
        stream = iter(Stream(shards, batch_size=8, seed=2, flip=True, crop_scale=0.3, attention=True))
        taken = list(islice(stream, 4))
        stream.close()

        assert heads == 3
        for batch in taken:
            flips = sample_flips(2, batch.epochs, batch.indices)
            boxes = sample_boxes(2, batch.epochs, batch.indices, size=32, scale=0.3)
            assert batch.attn.shape == (8, heads, 8, 8)
            assert batch.attn.dtype == np.uint8
            for row, index in enumerate(batch.indices):
                sample = shards.read(int(index), attention=True)
                assert sample.attn.max(axis=(1, 2)).tolist() == [255] * heads
                cut = crop_cells(sample.attn, tuple(boxes[row].tolist()), size=32)
                assert np.array_equal(batch.attn[row], cut[..., ::-1] if flips[row] else cut)
                parts = crop_cells(sample.parts, tuple(boxes[row].tolist()), size=32)
                assert np.array_equal(batch.parts[row], parts[:, ::-1] if flips[row] else parts)


def test_attention_lies_beside_the_images_too_and_changes_no_label(base, images, learned, tmp_path):
    out = tmp_path / "out"
    extract(settings(out, images=str(images), parts=learned, size=32, samples_per_shard=4, attention=True))

    assert verify(out, "deep") == []
    with ShardSet.open(out) as shards, ShardSet.open(base) as plain:
        assert shards.heads == 3
        for index in range(len(plain)):
            one, other = shards.read(index, attention=True), plain.read(index)
            assert one.attn.shape == (3, 4, 4)
            assert one.jpeg == other.jpeg
            assert np.array_equal(one.parts, other.parts)
            assert np.array_equal(one.fgrank, other.fgrank)


def test_g3_a_relabelling_that_is_killed_half_way_ends_with_the_same_bytes(base, labels, other_parts, tmp_path):
    """Batches of one image and a look at every file make the kill come between shards."""
    out = tmp_path / "killed"
    straight = tmp_path / "straight"
    extract(settings(straight, relabel=base, parts=other_parts, batch_size=1))
    options = f"--batch-size 1 --backend local --device cpu --precision fp32 --relabel {base} --parts {other_parts}"
    process = warm.python("-m", "pipeline", "extract", "--out", out, *options.split())
    while process.poll() is None and not list((out / "shards").glob("*.json")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted((out / "shards").glob("*.json"))
    kept = {path.with_suffix(".tar"): path.with_suffix(".tar").stat().st_mtime_ns for path in done}

    extract(settings(out, relabel=base, parts=other_parts, batch_size=1))

    assert 0 < len(kept) <= 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tars(out) == tars(straight)
    assert verify(out, "deep") == []
    assert read_json(out / "dataset.json")["fingerprint"] == read_json(straight / "dataset.json")["fingerprint"]


def test_s8_damage_in_a_base_image_fails_the_relabelling_with_its_name(mine, learned, tmp_path):
    """No image may be left without its label, so none is rejected here."""
    key, shard = flip_bit(mine, index=6)

    with pytest.raises(SampleError, match=rf"{shard}: jpg of {key} at byte \d+ is damaged"):
        extract(settings(tmp_path / "out", relabel=mine, parts=learned))

    assert not (tmp_path / "out/dataset.json").exists()


def flip_bit(folder: Path, *, index: int) -> tuple[str, str]:
    """A flipped bit in an image; its key and shard."""
    with ShardSet.open(folder) as shards:
        row, key = shards.row(index), shards.keys[index]
    tar = folder / f"shards/{row.shard:06d}.tar"
    data = bytearray(tar.read_bytes())
    data[row.begin + 100] ^= 4
    tar.write_bytes(data)
    return key, tar.name


def test_g2_a_repaired_image_is_taken_in_by_retry_failed_as_if_it_had_always_been_whole(images, learned, tmp_path):
    folder, out = Path(shutil.copytree(images, tmp_path / "images")), tmp_path / "out"
    options = {"images": str(folder), "parts": learned, "size": 32, "samples_per_shard": 4}
    extract(settings(out, **options))
    rejected = pq.read_table(out / "rejected.parquet").to_pylist()
    bad = f"{rejected[0]['ordinal'] // 4:06d}"
    before = state_of(out)
    shutil.copy(folder / "cat/002.jpg", folder / "dog/002.jpg")

    unasked = extract(settings(out, **options))
    info = extract(settings(out, retry_failed=True, **options))
    extract(settings(tmp_path / "whole", **options))

    assert [row["source"] for row in rejected] == ["dog/002.jpg"]
    assert (unasked["samples"], unasked["rejected"]) == (11, 1)
    assert (info["samples"], info["rejected"]) == (12, 0)
    after, whole = state_of(out), state_of(tmp_path / "whole")
    others = {name for name in before if name.startswith("shards/") and not name.startswith(f"shards/{bad}")}
    assert len(others) == 6
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    digests = {name: digest for name, (_, digest) in after.items() if name not in ("dataset.json", ".lock")}
    assert digests == {name: digest for name, (_, digest) in whole.items() if name not in ("dataset.json", ".lock")}
    assert info["fingerprint"] == read_json(tmp_path / "whole/dataset.json")["fingerprint"]
    assert verify(out, "deep") == []


def test_g4_retry_failed_on_a_set_without_rejects_touches_nothing(images, learned, tmp_path):
    options = {"images": str(images / "cat"), "parts": learned, "size": 32, "samples_per_shard": 4}
    extract(settings(tmp_path / "out", **options))
    before = state_of(tmp_path / "out")

    extract(settings(tmp_path / "out", retry_failed=True, **options))

    assert state_of(tmp_path / "out") == before


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


HARMS = {
    "a flipped bit": lambda folder: flip_bit(folder, index=6),
    "a deleted tar": lambda folder: (folder / "shards/000001.tar").unlink(),
    "a cut tar": lambda folder: tear(folder / "shards/000002.tar"),
    "a deleted sidecar": lambda folder: (folder / "shards/000001.json").unlink(),
    "a torn sidecar": lambda folder: tear(folder / "shards/000001.json"),
    "a torn parquet of a shard": lambda folder: tear(folder / "shards/000000.parquet"),
    "a deleted parquet of a shard": lambda folder: (folder / "shards/000000.parquet").unlink(),
    "a deleted index": lambda folder: (folder / "index.parquet").unlink(),
    "a torn index": lambda folder: tear(folder / "index.parquet"),
    "a deleted list of rejects": lambda folder: (folder / "rejected.parquet").unlink(),
    "a torn list of rejects": lambda folder: tear(folder / "rejected.parquet"),
    "a lying dataset.json": lambda folder: write_json(
        folder / "dataset.json", read_json(folder / "dataset.json") | {"groups": 2}
    ),
    "a torn plan": lambda folder: tear(folder / "plan.json"),
    "three harms at once": lambda folder: (
        flip_bit(folder, index=0),
        tear(folder / "shards/000001.json"),
        (folder / "index.parquet").unlink(),
    ),
}


def repair(folder: Path, **options) -> None:
    verify_verb(VerifyConfig(**{"data": folder, "level": "hash", "repair": True} | options))


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_g5_what_is_harmed_is_repaired_to_the_digests_it_had(harm, mine, capsys):
    before, info = state_of(mine), read_json(mine / "dataset.json")
    harm(mine)

    repair(mine, level="deep")

    assert "no fault at level" in capsys.readouterr().out
    after = state_of(mine)
    written = before.keys() - {"dataset.json", ".lock"}  # dataset.json names the commit that wrote it
    assert {name: after[name][1] for name in written} == {name: before[name][1] for name in written}
    assert read_json(mine / "dataset.json")["fingerprint"] == info["fingerprint"]
    assert verify(mine, "deep") == []


def test_g5_shards_that_were_whole_are_not_written_again(mine):
    before = state_of(mine)
    (mine / "shards/000001.tar").unlink()

    repair(mine)

    after = state_of(mine)
    assert {name for name in before if before[name][0] != after[name][0]} == {
        "shards/000001.tar",
        "shards/000001.parquet",
        "shards/000001.json",
    }


def test_g5_a_label_set_is_repaired_from_its_base(base, labels, tmp_path):
    mine = Path(shutil.copytree(labels, tmp_path / "mine"))
    before = tars(mine)
    (mine / "shards/000001.tar").unlink()
    tear(mine / "shards/000002.tar")

    repair(mine)

    assert tars(mine) == before
    assert verify(mine, "deep") == []


TOLD_BY_OTHERS = [
    "a torn sidecar", "a deleted sidecar", "a torn parquet of a shard", "a deleted index", "a torn list of rejects",
    "a lying dataset.json", "a torn plan",
]  # fmt: skip


@pytest.mark.parametrize("fault", TOLD_BY_OTHERS)
def test_what_other_files_tell_is_repaired_without_the_images(fault, mine, images):
    before = state_of(mine)
    HARMS[fault](mine)
    hidden = images.rename(images.with_name("hidden"))

    try:
        repair(mine, level="deep")
    finally:
        hidden.rename(images)

    assert {name: digest for name, (_, digest) in state_of(mine).items()} == {
        name: digest for name, (_, digest) in before.items()
    }


def test_what_no_other_file_tells_is_named_and_comes_back_by_the_command_that_made_it(mine, images, learned):
    path = mine / "dataset.json"
    before, tars_before = read_json(path), state_of(mine / "shards")
    write_json(path, before | {"producer": before["producer"] | {"git": "somewhere else"}})

    with pytest.raises(ShardError, match=r"has lost its producer, which no other file tells: run the extract command"):
        repair(mine)
    extract(settings(mine, images=str(images), parts=learned, size=32, samples_per_shard=4))

    assert read_json(path)["producer"]["git"] == before["producer"]["git"]
    assert state_of(mine / "shards") == tars_before
    assert verify(mine, "deep") == []


@pytest.mark.parametrize("fault", ["a flipped bit", "a deleted tar"])
def test_without_its_images_a_set_is_not_repaired_and_not_harmed_further(fault, images, learned, tmp_path):
    folder, out = Path(shutil.copytree(images, tmp_path / "images")), tmp_path / "out"
    extract(settings(out, images=str(folder), parts=learned, size=32, samples_per_shard=4))
    HARMS[fault](out)
    harmed = state_of(out)
    shutil.rmtree(folder)

    with pytest.raises(FileNotFoundError, match=f"no images at {folder}"):
        repair(out)

    assert state_of(out) == harmed


def test_a_set_that_comes_out_with_other_bytes_says_so(images, learned, tmp_path):
    """An image was edited since: the set is whole again, and another."""
    folder, out = Path(shutil.copytree(images, tmp_path / "images")), tmp_path / "out"
    extract(settings(out, images=str(folder), parts=learned, size=32, samples_per_shard=4))
    (out / "shards/000001.tar").unlink()
    white = io.BytesIO()
    Image.new("RGB", (48, 40), "white").save(white, "JPEG")
    for path in folder.rglob("*.jpg"):
        path.write_bytes(white.getvalue())

    with pytest.raises(ShardError, match=r"000001\.tar came out with other bytes .* \(same versions\); .* resumed"):
        repair(out)


def test_without_repair_faults_are_told_and_left(mine, tmp_path, capsys):
    key, _ = flip_bit(mine, index=6)

    with pytest.raises(ShardError, match=r"has 2 faults at level deep; repair it with --repair"):
        verify_verb(VerifyConfig(data=mine, level="deep", json=tmp_path / "faults.json"))

    told = read_json(tmp_path / "faults.json")
    assert {(fault["shard"], fault["key"]) for fault in told} == {("000001.tar", ""), ("000001.tar", key)}
    assert f"000001.tar  {key}  offset" in capsys.readouterr().out
