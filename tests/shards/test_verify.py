"""Any damage is found and named."""

import tarfile
from contextlib import suppress

import pytest
from conftest import write_set
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shards.atomic import read_json, write_json
from shards.errors import ShardError
from shards.record import restore
from shards.verify import Fault, verify
from shards.writer import shard_paths


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A set whose damage a test takes back."""
    return write_set(tmp_path_factory.mktemp("whole") / "set", count=6, size=16, samples_per_shard=3)


def offset_of(shards, index, member):
    row = shards.row(index)
    return row.begin + (0 if member == "jpg" else getattr(row, member))


def test_a_whole_set_has_no_fault(make_shards):
    assert verify(make_shards().path, "deep") == []


@pytest.mark.parametrize("member", ["jpg", "parts", "fgrank"])
def test_a_flipped_bit_is_found_and_named(member, make_shards):
    shards = make_shards()
    offset = offset_of(shards, 20, member) + 140
    tar = shards.path / "shards/000001.tar"
    data = bytearray(tar.read_bytes())
    data[offset] ^= 1
    tar.write_bytes(data)

    with pytest.raises(ShardError, match=r"000001\.tar: .* of 00000020"):
        shards.read(20)
    assert verify(shards.path, "fast") == []
    assert [fault.shard for fault in verify(shards.path, "hash")] == ["000001.tar"]
    assert "00000020" in [fault.key for fault in verify(shards.path, "deep")]


@settings(deadline=None, max_examples=30)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(place=0.44193909680516313, bit=0)  # the last byte of a header's checksum, which tarfile overlooks
def test_any_bit_of_a_member_is_found_and_its_sample_named(whole, place, bit):
    tar = shard_paths(whole, 1)[0]
    data = tar.read_bytes()
    with tarfile.open(tar) as members:
        spans = [(m.name[:8], m.offset, m.offset_data + m.size) for m in members]
    key, begin, end = spans[int(place * len(spans))]
    at = begin + int((place * len(spans)) % 1 * (end - begin))
    torn = bytearray(data)
    torn[at] ^= 1 << bit

    try:
        tar.write_bytes(torn)
        faults = verify(whole, "deep")
    finally:
        tar.write_bytes(data)

    assert {("000001.tar", ""), ("000001.tar", key)} <= {(fault.shard, fault.key) for fault in faults}


def test_every_cut_at_a_member_boundary_is_found(make_shards):
    shards = make_shards(count=4, samples_per_shard=4)
    tar = shards.path / "shards/000000.tar"
    whole = tar.read_bytes()

    for end in range(0, len(whole), 512):
        tar.write_bytes(whole[:end])
        assert verify(shards.path, "fast"), end


@pytest.mark.parametrize(
    "name", ["shards/000001.tar", "shards/000001.parquet", "shards/000001.json", "rejected.parquet"]
)
@pytest.mark.parametrize("level", ["fast", "hash", "deep"])
def test_a_lost_or_torn_file_is_named_at_every_level(name, level, make_shards):
    shards = make_shards(size=16)
    path = shards.path / name

    path.write_bytes(path.read_bytes()[:100])
    torn = verify(shards.path, level)
    path.unlink()
    lost = verify(shards.path, level)

    assert path.name in {fault.shard for fault in torn}
    assert path.name in {fault.shard for fault in lost}


def test_an_index_of_other_bytes_is_found_by_its_hash(make_shards):
    path = shard_paths(make_shards().path, 0)[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    assert verify(path.parents[1], "fast") == []
    assert verify(path.parents[1], "hash") == [Fault("000000.parquet", "", -1, "the sha256 differs")]


def test_members_in_another_order_are_found(make_shards):
    shards = make_shards(classes=0)
    path = shard_paths(shards.path, 0)[0]
    row = shards.row(0)
    data = bytearray(path.read_bytes())
    for name, at in (
        (b"00000000.fgrank.npy", (row.begin + row.parts)),
        (b"00000000.parts.npy", (row.begin + row.fgrank)),
    ):
        info = tarfile.TarInfo(name.decode())
        info.size = tarfile.TarInfo.frombuf(bytes(data[at - 512 : at]), "ascii", "strict").size
        data[at - 512 : at] = info.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(data)

    (member,) = [fault for fault in verify(shards.path, "deep") if fault.key]

    assert (member.key, member.offset) == ("00000000", (row.begin + row.parts))
    assert "expected 00000000.parts.npy" in member.what
    assert "found 00000000.fgrank.npy" in member.what


def test_labels_that_the_set_does_not_have_are_found(make_shards):
    """The writer refuses them, so the set is told to have fewer."""
    path = make_shards().path / "dataset.json"
    write_json(path, read_json(path) | {"groups": 2})

    faults = verify(path.parent, "deep")

    assert faults[0] == Fault("dataset.json", "", -1, "the fingerprint does not fit its contents")
    assert any("expected labels below 2" in fault.what for fault in faults)


def test_an_image_of_another_size_is_found(make_shards):
    path = make_shards(count=2).path / "dataset.json"
    write_json(path, read_json(path) | {"size": 64})

    assert [fault.key for fault in verify(path.parent, "deep")] == ["", "00000000", "00000001"]


def test_a_folder_without_a_whole_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"has no dataset\.json"):
        verify(tmp_path)


SMALL_FILES = ["dataset.json", "plan.json", "shards/000000.json", "shards/000001.json", "shards/000001.parquet"]


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(SMALL_FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_bit_of_a_small_file_is_found_and_comes_back_where_another_file_tells_it(whole, name, place, bit):
    """Or, of dataset.json, what nobody else tells is named, and nothing is written over it."""
    path = whole / name
    data = path.read_bytes()
    torn = bytearray(data)
    torn[int(place * len(data))] ^= 1 << bit

    try:
        path.write_bytes(torn)
        with suppress(ShardError):  # dataset.json is no JSON any more, or lacks a field: that is how it is found
            assert path.name in {fault.shard for fault in verify(whole, "deep")}
        restore(whole)
        back = path.read_bytes() == data
        assert back or (name == "dataset.json" and path.read_bytes() == torn)
    finally:
        path.write_bytes(data)


MADE_BY_HAND = ("producer", "inputs")
"""Of these, the plan of a test's set tells nothing."""


@pytest.mark.parametrize("field", ["producer", "inputs", "plan", "rejected", "rejected_sha256"])
def test_a_changed_field_of_dataset_json_is_named_and_comes_back_where_another_file_has_it(field, make_shards):
    path = make_shards(size=16).path / "dataset.json"
    info = read_json(path)
    write_json(path, info | {field: {"made": "up"}})

    assert Fault("dataset.json", "", -1, f"its field {field} is not as it was written") in verify(path.parent)
    assert restore(path.parent) == ([] if field in MADE_BY_HAND else ["dataset.json"])
    assert (read_json(path) == info) == (field not in MADE_BY_HAND)


def test_small_files_that_are_lost_come_back_from_the_others(make_shards):
    shards = make_shards(size=16)
    files = [shards.path / name for name in SMALL_FILES[1:]]
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()

    restore(shards.path)

    assert [path.read_bytes() for path in files] == before


def test_a_lost_sidecar_does_not_come_back_to_vouch_for_a_damaged_tar(make_shards):
    """As a repair leaves it that is killed: the sidecar goes first."""
    shards = make_shards(size=16)
    tar, _, sidecar = shard_paths(shards.path, 1)
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    sidecar.unlink()

    assert restore(shards.path) == []
    assert "000001.json" in {fault.shard for fault in verify(shards.path)}
