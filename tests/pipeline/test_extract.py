"""Extraction in processes that are killed, and on folders as people have them."""

import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import warm
from conftest import photographs, tars
from PIL import Image

from partlearn.config import ExtractConfig
from pipeline.extract import extract
from shards.errors import ShardError
from shards.shard_set import ShardSet
from shards.verify import verify
from training.checkpoint import CheckpointError
from training.config import RunConfig


@pytest.fixture(scope="module")
def parts(learned) -> Path:
    return learned


def config(images: Path, parts: Path, out: Path, **changes) -> ExtractConfig:
    settings = {"size": 32, "samples_per_shard": 4, "batch_size": 4, "backend": "local"} | changes
    return ExtractConfig(
        images=str(images), parts=parts, run=RunConfig(out=out, device="cpu", precision="fp32"), **settings
    )


def started(images: Path, parts: Path, out: Path, *, most_bytes: int | None = None) -> warm.Running:
    options = "--size 32 --samples-per-shard 4 --batch-size 4 --backend local --device cpu --precision fp32"
    to = ["--images", images, "--parts", parts, "--out", out]
    return warm.python("-m", "pipeline", "extract", *to, *options.split(), most_bytes=most_bytes)


def test_the_shards_have_the_quality_and_the_order_asked_for(parts, tmp_path):
    photos, kept = photographs(tmp_path / "photos", 6), {}
    for name, changes in {"plain": {}, "coarse": {"quality": 20}, "other": {"seed": 7}}.items():
        extract(config(photos, parts, tmp_path / name, **changes))
        with ShardSet.open(tmp_path / name) as shards:
            kept[name] = shards.sources, sum(len(shards.read(index).jpeg) for index in range(6))

    assert kept["coarse"][1] < 0.8 * kept["plain"][1]
    assert kept["coarse"][0] == kept["plain"][0] != kept["other"][0]


def test_killed_again_and_again_it_ends_with_the_same_bytes(parts, tmp_path):
    photos = photographs(tmp_path / "photos", 40)
    assert started(photos, parts, tmp_path / "straight").wait() == 0
    out, kills = tmp_path / "killed", 0

    for shards_seen in (1, 4):
        process = started(photos, parts, out)
        while process.poll() is None and len(list((out / "shards").glob("*.json"))) < shards_seen:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (out / "dataset.json").exists() or not kills
    done = [path.with_suffix(".tar") for path in (out / "shards").glob("*.json")]
    kept = {path: path.stat().st_mtime_ns for path in done}
    assert started(photos, parts, out).wait() == 0

    assert kills
    assert tars(out) == tars(tmp_path / "straight")
    assert verify(out, "deep") == []
    assert kept
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_the_unreadable_are_listed_and_the_rest_is_processed(parts, tmp_path):
    photos = photographs(tmp_path / "photos", 5)
    image = Image.open(photos / "000.jpg")
    image.convert("CMYK").save(photos / "cmyk.jpg")
    image.convert("L").save(photos / "grey.jpg")
    image.save(photos / "png_named.jpg", "PNG")
    Image.fromarray(np.full((40, 48), 30_000, np.uint16)).save(photos / "deep.png")
    (photos / "truncated.jpg").write_bytes((photos / "001.jpg").read_bytes()[:300])
    (photos / "text.jpg").write_text("no image at all")
    (photos / "notes.txt").write_text("not even named like one")

    info = extract(config(photos, parts, tmp_path / "out"))

    rejected = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert {row["source"] for row in rejected} == {"truncated.jpg", "text.jpg"}
    assert all(row["step"] == "decode" and row["reason"] for row in rejected)
    assert (info["samples"], info["rejected"], info["inputs"]["count"]) == (9, 2, 11)
    with ShardSet.open(tmp_path / "out") as shards:
        assert {"cmyk.jpg", "grey.jpg", "png_named.jpg", "deep.png"} <= set(shards.sources)
    assert verify(tmp_path / "out", "deep") == []


def test_an_outage_does_not_pass_for_a_set_of_few_images(parts, tmp_path):
    photos, out = photographs(tmp_path / "photos", 14), tmp_path / "out"
    for number in range(11):
        (photos / f"{number:03d}.jpg").write_bytes(b"")

    with pytest.raises(ShardError, match=r"11 of 14 images could not be read, the first, .*--max-rejects"):
        extract(config(photos, parts, out))

    assert not (out / "dataset.json").exists()
    assert extract(config(photos, parts, out, max_rejects=0.8))["rejected"] == 11


def test_other_images_of_the_same_names_are_refused_in_the_same_folder(parts, tmp_path):
    photos, out = photographs(tmp_path / "photos", 3), tmp_path / "out"
    extract(config(photos, parts, out))
    (tmp_path / "others").mkdir()

    with pytest.raises(ValueError, match=r"--images was .*photos', now .*others/photos'"):
        extract(config(photographs(tmp_path / "others/photos", 3), parts, out))


def test_other_settings_in_the_same_folder_are_refused(parts, tmp_path):
    photos = photographs(tmp_path / "photos", 3)
    extract(config(photos, parts, tmp_path / "out"))

    with pytest.raises(ValueError, match="quality was 90, now 80"):
        extract(config(photos, parts, tmp_path / "out", quality=80))


def test_a_finished_set_is_left_untouched(parts, tmp_path):
    photos = photographs(tmp_path / "photos", 6)
    extract(config(photos, parts, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != ".lock"}

    extract(config(photos, parts, tmp_path / "out"))

    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_disk_without_room_is_one_sentence_and_a_rerun_goes_on(parts, tmp_path):
    """A limit on the size of files stands in for a full disk: the same write fails with an OSError."""
    photos, out = photographs(tmp_path / "photos", 12), tmp_path / "out"

    failed = started(photos, parts, out, most_bytes=8 * 1024).finished()

    assert failed.returncode == 1
    assert "File too large" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list((out / "shards").iterdir()) == []
    assert extract(config(photos, parts, out))["samples"] == 12


def test_of_two_drivers_in_one_folder_one_builds_and_the_other_says_so(parts, tmp_path):
    photos, out = photographs(tmp_path / "photos", 40), tmp_path / "out"
    extract(config(photos, parts, tmp_path / "alone"))

    first = started(photos, parts, out)
    while first.poll() is None and not (out / "plan.json").exists():
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # the second comes while the first is at work, however fast the machine
    second = started(photos, parts, out).finished()
    first.send_signal(signal.SIGCONT)

    assert first.wait(timeout=200) == 0
    assert second.returncode == 1
    assert "is being built by another process" in second.stderr
    assert tars(out) == tars(tmp_path / "alone")


def test_an_encoder_the_parts_were_not_learned_on_is_refused(parts, tmp_path):
    photos = photographs(tmp_path / "photos", 3)

    with pytest.raises(CheckpointError, match="not those that"):
        extract(config(photos, parts, tmp_path / "out", encoder="random:vit_small_patch16_224"))
