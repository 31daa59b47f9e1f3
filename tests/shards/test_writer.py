"""A shard set is whole or absent, the same bytes every time, and readable by anyone."""

import dataclasses
import gc
import io
import json
import pickle
import signal
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import drawn, write_set
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.atomic import read_json, sha256_file
from shards.build import finalise, open_plan, shard_done
from shards.errors import ShardError
from shards.sample import Rejected, check_labels, npy_bytes
from shards.shard_set import ShardSet
from shards.writer import shard_paths, write_shard

INFO = {"grid": 4, "groups": 4, "size": 16, "classes": []}


def labelled(count, seed=0):
    return list(drawn(count, 16, 4, 4, 0, seed))


def plan_of(shards):
    return read_json(shard_paths(shards.path, 0)[2])["plan"]


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


@settings(deadline=None)
@given(grid=st.integers(1, 40), dtype=st.sampled_from(["|u1", "<u2"]), seed=st.integers(0, 9))
def test_npy_members_are_numpys_own_format(grid, dtype, seed):
    array = np.random.default_rng(seed).integers(0, 256, (grid, grid)).astype(dtype)

    data = npy_bytes(array)

    assert np.array_equal(np.load(io.BytesIO(data)), array)
    assert len(data) == 128 + array.nbytes


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


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from shards.writer import write_shard

def killed():
    yield from pickle.load(sys.stdin.buffer)
    os.kill(os.getpid(), signal.SIGKILL)

write_shard(Path(sys.argv[1]), 0, killed(), groups=4, plan_digest=sys.argv[2], rejected=[])
"""


@pytest.mark.slow
def test_after_a_kill_the_next_run_makes_the_same_bytes_and_sweeps(tmp_path):
    def build(folder):
        folder.mkdir(exist_ok=True)
        digest = open_plan(folder, {"seed": 0})
        if not shard_done(folder, 0, digest):
            write_shard(folder, 0, labelled(4), groups=4, plan_digest=digest, rejected=[])
        finalise(folder, shard_count=1, plan_digest=digest, info=INFO | {"inputs": {"count": 4}})

    build(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    digest = open_plan(tmp_path / "killed", {"seed": 0})
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), digest]
    killed = subprocess.run(
        command, input=pickle.dumps(labelled(3)), cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.suffix for path in (tmp_path / "killed/shards").iterdir()] != []

    build(tmp_path / "killed")

    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_a_kill_while_the_plan_is_written_does_not_close_the_folder(tmp_path):
    (tmp_path / (".plan.json." + "0f" * 16)).write_text('{"se')
    (tmp_path / ".lock").touch()

    assert open_plan(tmp_path, {"seed": 0}) == open_plan(tmp_path, {"seed": 0})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(ValueError, match="neither empty nor a shard set"):
        open_plan(tmp_path, {"seed": 0})


def test_an_old_sidecar_does_not_vouch_for_new_bytes(tmp_path):
    write_shard(tmp_path, 0, labelled(4), groups=4, plan_digest="x", rejected=[])

    def dying():
        raise OSError("No space left on device")
        yield

    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, 0, dying(), groups=4, plan_digest="x", rejected=[])

    assert not shard_done(tmp_path, 0, "x")


def test_a_folder_takes_one_plan_for_life(tmp_path):
    open_plan(tmp_path, {"size": 256, "seed": 0})
    open_plan(tmp_path, {"size": 224, "seed": 0})  # of which nothing is built yet
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/000000.tar").touch()

    with pytest.raises(ValueError, match="--size was 224, now 192"):
        open_plan(tmp_path, {"size": 192, "seed": 0})


def test_finishing_twice_writes_nothing(make_shards):
    shards = make_shards()
    before = {path: path.stat().st_mtime_ns for path in shards.path.rglob("*")}

    info = finalise(shards.path, shard_count=3, plan_digest=plan_of(shards), info={})

    assert info == shards.info
    assert {path: path.stat().st_mtime_ns for path in shards.path.rglob("*")} == before


@pytest.mark.parametrize("lost", ["dataset.json", "index.parquet", "rejected.parquet"])
def test_finishing_makes_lost_files_again(lost, make_shards):
    shards = make_shards()
    before = digests(shards.path)
    (shards.path / lost).unlink()

    finalise(shards.path, shard_count=3, plan_digest=plan_of(shards), info=shards.info)

    assert digests(shards.path) == before


def test_a_shard_made_anew_with_other_bytes_is_told_in_dataset_json(make_shards):
    shards = make_shards(size=16, classes=0)
    write_shard(shards.path, 2, labelled(40, seed=7)[32:], groups=4, plan_digest=plan_of(shards), rejected=[])

    info = finalise(shards.path, shard_count=3, plan_digest=plan_of(shards), info=shards.info)

    assert info["fingerprint"] != shards.fingerprint
    assert ShardSet.open(shards.path).read(39).fgrank.tolist() == labelled(40, seed=7)[39].fgrank.tolist()


def test_rejects_are_told_and_a_shard_may_be_all_of_them(tmp_path):
    digest, rejected = open_plan(tmp_path, {"seed": 0}), []

    def half():
        yield from labelled(2)
        rejected.append(Rejected("b.jpg", 2, "decode", "no image"))

    write_shard(tmp_path, 0, half(), groups=4, plan_digest=digest, rejected=rejected)
    write_shard(tmp_path, 1, [], groups=4, plan_digest=digest, rejected=[Rejected("c.jpg", 3, "read", "gone")])
    info = finalise(tmp_path, shard_count=2, plan_digest=digest, info=INFO | {"inputs": {"count": 4}})

    assert (info["samples"], info["rejected"], len(ShardSet.open(tmp_path))) == (2, 2, 2)
    assert pq.read_table(tmp_path / "rejected.parquet").to_pylist() == [
        {"source": "b.jpg", "ordinal": 2, "step": "decode", "reason": "no image"},
        {"source": "c.jpg", "ordinal": 3, "step": "read", "reason": "gone"},
    ]


def test_inputs_that_are_nowhere_stop_the_finish(tmp_path):
    digest = open_plan(tmp_path, {"seed": 0})
    write_shard(tmp_path, 0, labelled(2), groups=4, plan_digest=digest, rejected=[])

    with pytest.raises(ShardError, match="2 samples and 0 rejects do not sum to 3 inputs"):
        finalise(tmp_path, shard_count=1, plan_digest=digest, info=INFO | {"inputs": {"count": 3}})


def test_a_tar_is_the_one_of_every_release(tmp_path):
    """Bytes in place of a JPEG, so that no encoder has a say."""
    sample = dataclasses.replace(
        labelled(1)[0],
        class_id=2,
        jpeg=bytes(range(256)) * 3,
        parts=np.arange(16, dtype=np.uint8).reshape(4, 4) % 4,
        fgrank=np.arange(16, dtype=np.uint16)[::-1].reshape(4, 4),
    )

    sidecar = write_shard(tmp_path, 0, [sample], groups=4, plan_digest="x", rejected=[])

    assert sidecar["tar"] == {"bytes": 10240, "sha256": GOLDEN_TAR}
    assert sidecar["tar"]["sha256"] == sha256_file(shard_paths(tmp_path, 0)[0])


GOLDEN_TAR = "d1dc02d2aa9a4b755239b821671a380db3acf34af160dafe45dde7b75c127995"


def test_headers_say_nothing_of_the_machine(make_shards):
    with tarfile.open(shard_paths(make_shards().path, 0)[0]) as tar:
        told = {(m.mode, m.uid, m.gid, m.uname, m.gname, m.mtime, m.type, tuple(m.pax_headers)) for m in tar}

    assert told == {(0o444, 0, 0, "", "", 0, tarfile.REGTYPE, ())}


def test_the_fingerprint_is_of_what_the_set_is(make_shards):
    one, same, other = make_shards("one"), make_shards("same"), make_shards("other", seed=1)

    assert one.fingerprint == same.fingerprint != other.fingerprint


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


@pytest.mark.parametrize("parts", [np.zeros((4, 4), np.int64), np.zeros((2, 8), np.uint8)])
def test_labels_of_another_type_or_shape_are_refused(parts):
    with pytest.raises(ShardError, match=r"a\.jpg has .* labels .*, expected uint8 and uint16 of one shape"):
        check_labels(parts, labelled(1)[0].fgrank, groups=4, name="a.jpg")


@pytest.mark.parametrize(("name", "data"), [("dataset.json", b"{"), ("index.parquet", b"PAR1")])
def test_a_torn_file_of_the_set_is_named(name, data, make_shards):
    path = make_shards().path / name
    path.write_bytes(data)

    with pytest.raises(ShardError, match=name):
        ShardSet.open(path.parent)
