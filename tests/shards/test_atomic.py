"""A file is whole or absent; the same value has the same digest."""

import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.atomic import read_json, sha256_file, sha256_json, sweep, write_json, write_whole

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    write_whole(tmp_path / "a.json", b"old")

    with pytest.raises(TypeError):
        write_whole(tmp_path / "a.json", "text is no bytes")

    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_into_no_folder_passes_the_error_on(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "a", b"data")


def test_what_is_written_is_what_is_read(tmp_path):
    value = {"b": [1, None, "ü"], "a": {"c": 1.5}}

    write_json(tmp_path / "a.json", value)

    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text().index('"a"') < (tmp_path / "a.json").read_text().index('"b"')
    assert sha256_file(tmp_path / "a.json") == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()


def test_a_torn_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')

    with pytest.raises(ValueError, match=r"a\.json is no whole JSON file"):
        read_json(tmp_path / "a.json")


@settings(deadline=None)
@given(value=st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_the_digest_does_not_depend_on_the_order_of_keys(value):
    assert sha256_json(value) == sha256_json(dict(reversed(value.items())))


def test_only_what_writers_left_aside_is_swept(tmp_path):
    kept = {".lock", ".plan.json", "a.json"}
    for name in (*kept, ".a.json." + "0f" * 16):
        (tmp_path / name).touch()

    sweep(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_write_that_fails_leaves_the_old_file_as_it_was(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", b"new")

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
