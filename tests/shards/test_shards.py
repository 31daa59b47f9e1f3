"""The shard set: whole or absent, the same bytes every time, readable by anyone, and honest about damage."""

import gc
import io
import json
import tarfile
import warnings

import numpy as np
import pytest
import webdataset
from conftest import drawn, write_set
from PIL import Image

from shards.atomic import sha256_file, write_whole
from shards.dataset import ShardSet, finalise, open_plan, shard_done
from shards.errors import ShardError
from shards.sample import from_npy, npy_bytes
from shards.verify import verify
from shards.writer import shard_paths, write_shard


def digests(folder):
    return {path.name: sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    write_set(tmp_path / "one")
    write_set(tmp_path / "two")

    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_stock_webdataset_and_plain_tarfile_read_the_same_samples(make_shards):
    shards = make_shards(count=20)
    urls = [str(path) for path in sorted((shards.path / "shards").glob("*.tar"))]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its tars to the garbage collector
        stock = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        gc.collect()

    assert [sample["__key__"] for sample in stock] == shards.keys
    for index, sample in enumerate(stock):
        ours = shards.read(index)
        assert np.array_equal(sample["parts.npy"], ours.parts)
        assert np.array_equal(sample["fgrank.npy"], ours.fgrank)
        assert sample["cls"] == ours.class_id
        assert np.array_equal(sample["jpg"], np.asarray(Image.open(io.BytesIO(ours.jpeg))))
    with tarfile.open(urls[0]) as tar:
        names = tar.getnames()[:4]
        assert names == [f"00000000.{kind}" for kind in ("jpg", "cls", "parts.npy", "fgrank.npy")]
        member = tar.extractfile(names[2])
        assert np.array_equal(np.load(io.BytesIO(member.read())), shards.read(0).parts)


def test_labels_come_back_as_they_were_written(make_shards):
    shards = make_shards(count=5)

    for index, written in enumerate(drawn(5, 32, 4, 4, 3, 0)):
        read = shards.read(index)
        assert (read.jpeg, read.class_id, read.key) == (written.jpeg, written.class_id, written.key)
        assert np.array_equal(read.parts, written.parts)
        assert read.parts.dtype == np.uint8
        assert np.array_equal(read.fgrank, written.fgrank)
        assert read.fgrank.dtype == np.uint16


def test_npy_members_are_numpys_own_format():
    for array in (np.arange(16, dtype=np.uint8).reshape(4, 4), np.arange(784, dtype=np.uint16).reshape(28, 28)):
        data = npy_bytes(array)

        assert np.array_equal(np.load(io.BytesIO(data)), array)
        assert np.array_equal(from_npy(data, array.dtype.str.replace("=", "<"), len(array)), array)


def test_without_its_sidecar_a_shard_is_not_done(tmp_path):
    digest = open_plan(tmp_path, {"seed": 0})
    write_shard(tmp_path, 0, drawn(4, 16, 4, 4, 0, 0), groups=4, plan_digest=digest, rejected=[])
    assert shard_done(tmp_path, 0, digest)

    shard_paths(tmp_path, 0)[2].unlink()

    assert not shard_done(tmp_path, 0, digest)
    with pytest.raises(ShardError, match="lacks 1 of 1 shards"):
        finalise(tmp_path, shard_count=1, plan_digest=digest, info={"inputs": {"count": 4}})


def test_a_writer_that_dies_leaves_nothing_that_looks_whole(tmp_path):
    def dying():
        yield from drawn(3, 16, 4, 4, 0, 0)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, 0, dying(), groups=4, plan_digest="x", rejected=[])

    assert list((tmp_path / "shards").iterdir()) == []


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    write_whole(tmp_path / "a.json", b"old")

    with pytest.raises(TypeError):
        write_whole(tmp_path / "a.json", "text is no bytes")

    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_takes_one_plan_for_life(tmp_path):
    open_plan(tmp_path, {"size": 224, "seed": 0})

    with pytest.raises(ValueError, match="size was 224, now 192"):
        open_plan(tmp_path, {"size": 192, "seed": 0})


def test_finishing_twice_writes_nothing(make_shards):
    shards = make_shards()
    before = {path: path.stat().st_mtime_ns for path in shards.path.rglob("*")}

    finalise(shards.path, shard_count=3, plan_digest="", info={})

    assert {path: path.stat().st_mtime_ns for path in shards.path.rglob("*")} == before


@pytest.mark.parametrize(("parts", "ranks", "sentence"), [(9, None, "part label 9"), (None, 3, "no permutation")])
def test_labels_out_of_range_are_not_written(parts, ranks, sentence, tmp_path):
    sample = next(drawn(1, 16, 4, 4, 0, 0))
    if parts:
        sample.parts[0, 0] = parts
    if ranks:
        sample.fgrank[:2, 0] = ranks

    with pytest.raises(ShardError, match=sentence):
        write_shard(tmp_path, 0, [sample], groups=4, plan_digest="x", rejected=[])


def test_an_unfinished_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shard set at"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"no dataset\.json"):
        ShardSet.open(tmp_path)


def test_another_major_version_is_refused(make_shards):
    path = make_shards().path / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))

    with pytest.raises(ShardError, match="version 2, expected semmae-shards version 1"):
        ShardSet.open(path.parent)


@pytest.mark.parametrize("member", ["jpg_offset", "parts_offset", "fgrank_offset"])
def test_a_flipped_bit_is_found_and_named(member, make_shards):
    shards = make_shards()
    offset = int(shards._columns[member][20]) + 140
    tar = shards.path / "shards/000001.tar"
    data = bytearray(tar.read_bytes())
    data[offset] ^= 1
    tar.write_bytes(data)

    with pytest.raises(ShardError, match=r"000001\.tar: .* of 00000020"):
        shards.read(20)
    assert verify(shards.path, "fast") == []
    assert [fault.shard for fault in verify(shards.path, "hash")] == ["000001.tar"]
    assert "00000020" in [fault.key for fault in verify(shards.path, "deep")]


def test_every_cut_at_a_member_boundary_is_found(make_shards):
    shards = make_shards(count=4, samples_per_shard=4)
    tar = shards.path / "shards/000000.tar"
    whole = tar.read_bytes()

    for end in range(0, len(whole), 512):
        tar.write_bytes(whole[:end])
        assert verify(shards.path, "fast"), end


def test_a_whole_set_has_no_fault(make_shards):
    assert verify(make_shards().path, "deep") == []
