"""S1-S5, S8, S9: every sample once, in an order of seed and epoch alone, from any position, on any number of ranks."""

import dataclasses
import io
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import drawn, open_files, write_samples, write_set
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards import shard_set
from shards.atomic import read_json, write_json
from shards.batches import Batch, in_order
from shards.decode import decode_jpeg_into
from shards.errors import SampleError, ShardError
from shards.open_file import OpenFile
from shards.shard_set import ShardSet
from shards.stream import Stream


def indices(stream: Stream, batches: int) -> list[int]:
    iterator = iter(stream)
    found = [int(index) for batch in islice(iterator, batches) for index in batch.indices]
    iterator.close()
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 16, 40, 64])
def test_each_sample_comes_once_an_epoch_whatever_the_batch(batch_size, make_shards):
    shards = make_shards()

    seen = indices(Stream(shards, batch_size=batch_size, seed=1), -(-120 // batch_size))[:120]

    for epoch in range(3):
        assert sorted(seen[40 * epoch : 40 * (epoch + 1)]) == list(range(40))
    assert seen[:40] != seen[40:80]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_batch_of_one(world_size, make_shards):
    shards = make_shards()
    alone = indices(Stream(shards, batch_size=12, seed=0), 5)

    ranks = [
        indices(Stream(shards, batch_size=12, seed=0, rank=r, world_size=world_size), 5) for r in range(world_size)
    ]

    local = 12 // world_size
    joined = [i for step in range(5) for rank in ranks for i in rank[step * local : (step + 1) * local]]
    assert joined == alone


@pytest.mark.parametrize("position", [12, 36, 48, 4800])
def test_starting_at_a_position_gives_what_followed_it(position, make_shards):
    shards = make_shards()
    steps = position // 12
    whole = iter(Stream(shards, batch_size=12, seed=0, position=(steps - 1) * 12))
    next(whole)

    resumed = iter(Stream(shards, batch_size=12, seed=0, position=position))

    for _ in range(3):
        one, other = next(whole), next(resumed)
        assert one.position == other.position
        for name in ("images", "parts", "fgrank", "class_ids", "indices", "epochs"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    whole.close()
    resumed.close()


def test_thread_count_changes_nothing(make_shards):
    shards = make_shards()
    iterators = [iter(Stream(shards, batch_size=10, seed=0, threads=threads)) for threads in (1, 3)]

    for one, other in islice(zip(*iterators, strict=True), 6):
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.parts, other.parts)
    for iterator in iterators:
        iterator.close()


def test_no_thread_is_left_behind(make_shards):
    before = threading.active_count()
    iterator = iter(Stream(make_shards(), batch_size=8, seed=0))
    next(iterator)

    iterator.close()

    assert threading.active_count() == before


def test_leaving_in_order_early_leaves_no_thread(make_shards):
    before = threading.active_count()
    iterator = in_order(make_shards(), batch_size=8)
    next(iterator)

    iterator.close()

    assert threading.active_count() == before


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_decoding_ahead_changes_nothing(prefetch, make_shards):
    shards = make_shards()

    ahead = indices(Stream(shards, batch_size=12, seed=0, prefetch=prefetch), 7)

    assert ahead == indices(Stream(shards, batch_size=12, seed=0), 7)


def test_a_batch_holds_what_the_shards_hold(make_shards):
    shards = make_shards()
    iterator = iter(Stream(shards, batch_size=30, seed=0, position=60))
    batch = next(iterator)
    iterator.close()

    assert (batch.position, batch.epochs.tolist()) == (60, [1] * 20 + [2] * 10)
    for row, index in enumerate(batch.indices):
        sample = shards.read(int(index))
        assert np.array_equal(batch.parts[row], sample.parts)
        assert np.array_equal(batch.fgrank[row], sample.fgrank)
        assert batch.class_ids[row] == sample.class_id
        with Image.open(io.BytesIO(sample.jpeg)) as image:
            assert np.array_equal(batch.images[row], np.asarray(image))


@pytest.mark.parametrize("batch_size", [0, -4])
def test_an_empty_batch_is_refused(batch_size, make_shards):
    with pytest.raises(ValueError, match="cannot be shared"):
        Stream(make_shards(), batch_size=batch_size, seed=0)


def test_a_batch_that_ranks_cannot_share_is_refused(make_shards):
    with pytest.raises(ValueError, match="a batch of 10 cannot be shared by 4 ranks"):
        Stream(make_shards(), batch_size=10, seed=0, world_size=4)


def test_damage_stops_the_stream_and_is_named(make_shards):
    shards = make_shards()
    tar = shards.path / "shards/000002.tar"
    tar.write_bytes(tar.read_bytes()[:3000])

    with pytest.raises(ShardError, match=r"000002\.tar"):
        indices(Stream(shards, batch_size=8, seed=0), 5)


def test_a_lost_shard_stops_the_stream_and_is_named(make_shards):
    shards = make_shards()
    (shards.path / "shards/000001.tar").unlink()

    with pytest.raises(ShardError, match=r"000001\.tar is missing"):
        list(in_order(shards, batch_size=8))


def test_an_image_of_the_wrong_size_stops_the_stream_and_is_named(make_shards):
    shards = make_shards(size=32)
    shards.size = 16

    with pytest.raises(ShardError, match=r"000000\.tar: jpg of 0000000\d at byte \d+ .* expected 16x16"):
        next(in_order(shards, batch_size=8))


def test_in_order_gives_every_sample_once(make_shards):
    batches = list(in_order(make_shards(), batch_size=16))

    assert np.concatenate([batch.indices for batch in batches]).tolist() == list(range(40))
    assert len(batches[-1].images) == 8


def test_an_image_of_another_size_is_refused(make_shards):
    jpeg = make_shards(size=32).read(0).jpeg

    with pytest.raises(ValueError, match="is 32x32, expected 16x16"):
        decode_jpeg_into(jpeg, np.empty((16, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[ShardSet]:
    """A set that is only read, or whose damage a test takes back."""
    with ShardSet.open(write_set(tmp_path_factory.mktemp("whole") / "set", count=40, size=16)) as shards:
        yield shards


def rows_of(batch: Batch) -> list[tuple]:
    """All that a batch holds of each sample, comparable."""
    arrays = (batch.epochs, batch.indices, batch.class_ids, batch.images, batch.parts, batch.fgrank)
    return [tuple(array[row].tobytes() for array in arrays) for row in range(len(batch.indices))]


def run(
    shards: ShardSet, *, world_size: int, steps: int, state: dict[str, Any] | None = None, **options: Any
) -> tuple[list[tuple], dict[str, Any]]:
    """`steps` batches of a run on `world_size` ranks, begun or resumed; its samples in order, and its state after.

    S9: all ranks get batches of one size, at the end of an epoch too.
    """
    streams = [Stream(shards, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    if state:
        for stream in streams:
            stream.resume(state)
    begun = state["position"] if state else 0
    iterators = [iter(stream) for stream in streams]
    batches = [next(iterator) for _ in range(steps) for iterator in iterators]
    assert {len(batch.indices) for batch in batches} <= {options["batch_size"] // world_size}
    taken = [row for batch in batches for row in rows_of(batch)]
    for iterator in iterators:
        iterator.close()
    after, *others = [stream.state(begun + steps * options["batch_size"]) for stream in streams]
    assert all(other == after for other in others)
    return taken, after


worlds = st.sampled_from([1, 2, 3, 4, 6, 12])


@settings(deadline=None, max_examples=15)
@given(
    world_sizes=st.tuples(worlds, worlds, worlds),
    steps=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4)),
    batch_size=st.sampled_from([12, 24, 36, 60]),
    threads=st.integers(1, 4),
    window=st.integers(0, 3),
    crop_scale=st.sampled_from([1.0, 0.4]),
)
def test_s3_s4_stopped_twice_and_resumed_on_other_ranks_it_goes_on_as_if_never_stopped(
    world_sizes, steps, batch_size, threads, window, crop_scale, whole
):
    options = {"batch_size": batch_size, "seed": 5, "window": window, "flip": True, "crop_scale": crop_scale}
    straight, _ = run(whole, world_size=1, steps=sum(steps), **options)

    taken, state = [], None
    for world_size, part in zip(world_sizes, steps, strict=True):
        rows, state = run(whole, world_size=world_size, steps=part, state=state, threads=threads, **options)
        taken += rows

    assert taken == straight
    assert state["position"] == sum(steps) * batch_size


def test_s4_a_run_may_go_on_with_another_batch_size(whole):
    first, state = run(whole, world_size=2, steps=3, batch_size=12, seed=0)

    then, _ = run(whole, world_size=3, steps=2, state=state, batch_size=9, seed=0)

    straight, _ = run(whole, world_size=1, steps=1, batch_size=54, seed=0)
    assert first + then == straight


def test_s4_a_state_is_a_few_plain_values_and_survives_json(whole, tmp_path):
    stream = Stream(whole, batch_size=8, seed=3, window=2)

    write_json(tmp_path / "state.json", stream.state(24))

    assert read_json(tmp_path / "state.json") == {
        "version": 1,
        "position": 24,
        "seed": 3,
        "order": "window:2/v1",
        "fingerprint": whole.fingerprint,
    }
    stream.resume(read_json(tmp_path / "state.json"))
    assert stream.position == 24


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"window": 2}, "order was global/v1, now window:2/v1"),
        ({"seed": 1, "window": 2}, "seed was 0, now 1; order was global/v1, now window:2/v1"),
    ],
)
def test_s8_a_state_of_another_order_is_refused_by_the_field(now, told, whole):
    state = Stream(whole, batch_size=8, seed=0).state(16)
    stream = Stream(whole, **{"batch_size": 8, "seed": 0} | now)

    with pytest.raises(ValueError, match=rf"fed by another stream \({told}\); give it the same --data"):
        stream.resume(state)

    assert stream.position == 0


def test_s8_a_state_of_another_version_or_none_is_refused_by_the_field(whole):
    stream = Stream(whole, batch_size=8, seed=0)

    with pytest.raises(ValueError, match="version was 0, now 1"):
        stream.resume(stream.state(16) | {"version": 0})
    with pytest.raises(ValueError, match="fingerprint was None"):
        stream.resume({"version": 1, "position": 16, "seed": 0, "order": "global/v1"})


def test_s8_a_state_of_other_shards_or_labels_is_refused_by_the_field(make_shards, tmp_path):
    one, other = make_shards("one"), make_shards("other", seed=1)
    state = Stream(one, batch_size=8, seed=0).state(16)
    info = {"grid": 4, "groups": 4, "size": 32, "classes": list(one.classes), "labels_of": one.fingerprint}
    alone = (dataclasses.replace(sample, jpeg=b"") for sample in drawn(40, 32, 4, 4, 3, seed=7))
    labels = write_samples(tmp_path / "labels", alone, info, samples_per_shard=16)

    with pytest.raises(ValueError, match=f"fingerprint was {one.fingerprint}, now {other.fingerprint}"):
        Stream(other, batch_size=8, seed=0).resume(state)
    with ShardSet.open(one.path, labels=labels) as relabelled:
        stream = Stream(relabelled, batch_size=8, seed=0)
        with pytest.raises(ValueError, match=rf"fingerprint was {one.fingerprint}, now {one.fingerprint}\+[0-9a-f]+\)"):
            stream.resume(state)
        stream.resume(stream.state(16))


class Counting(OpenFile):
    """An open shard that reports every read."""

    reads: list[int] = []  # noqa: RUF012 (one list for all files)

    def read(self, size: int, offset: int) -> bytes:
        self.reads.append(size)
        return super().read(size, offset)


@pytest.mark.parametrize("position", [0, 20, 39, 40 * 10**6 + 7])
def test_s5_going_on_anywhere_reads_the_samples_of_the_first_batch_and_no_more(position, make_shards, monkeypatch):
    monkeypatch.setattr(shard_set, "OpenFile", Counting)
    monkeypatch.setattr(Counting, "reads", [])
    shards = make_shards()

    stream = Stream(shards, batch_size=5, seed=0, prefetch=0)
    stream.resume(stream.state(position))
    before = len(Counting.reads)
    batch = next(iter(stream))

    assert before == 0
    assert batch.position == position
    assert len(Counting.reads) == 5
    assert sum(Counting.reads) < shards.info["shards"][0]["bytes"] / 2


def test_batches_that_are_held_are_never_written_over(whole):
    """Memory of earlier batches is used again, but not while they, a view or a tensor of them are alive."""
    iterator = iter(Stream(whole, batch_size=10, seed=0))

    held, meant = [], []
    for number, batch in enumerate(islice(iterator, 12)):
        pixels = batch.images
        held.append((batch, pixels, pixels[3:], torch.from_numpy(pixels), pixels[0].reshape(-1))[number % 5])
        meant.append(pixels.copy())
        del batch, pixels
    iterator.close()

    for number, (one, copy) in enumerate(zip(held, meant, strict=True)):
        expected = (copy, copy, copy[3:], copy, copy[0].reshape(-1))[number % 5]
        assert np.array_equal(one.images if isinstance(one, Batch) else np.asarray(one), expected)


@pytest.mark.parametrize("window", [0, 1])
def test_the_first_samples_are_those_of_the_order_as_they_are_stored_whenever_they_are_asked_for(window, whole):
    (all_of_it,) = in_order(whole, batch_size=len(whole))
    stream = Stream(whole, batch_size=8, seed=3, window=window, flip=True, crop_scale=0.3)
    alone = [batch.indices.tolist() for batch in islice(iter(stream), 3)]
    batches = iter(stream)
    began = [next(batches).indices.tolist() for _ in range(2)]

    first, every = stream.stored(5), stream.stored(10**6)

    assert first.indices.tolist() == sorted(alone[0][:5])
    assert every.indices.tolist() == list(range(len(whole)))
    for name in ("images", "parts", "fgrank"):
        assert np.array_equal(getattr(first, name), getattr(all_of_it, name)[first.indices])
    assert [*began, next(batches).indices.tolist()] == alone
    batches.close()


def damage(shards: ShardSet, index: int, member: str = "jpg", bit: int = 0) -> None:
    """Flip a bit in the payload of a member."""
    row = shards.row(index)
    tar = shards.path / f"shards/{row.shard:06d}.tar"
    data = bytearray(tar.read_bytes())
    data[row.begin + (0 if member == "jpg" else getattr(row, member)) + 140] ^= 1 << bit
    tar.write_bytes(data)


@pytest.mark.parametrize("member", ["jpg", "parts", "fgrank"])
def test_s8_a_damaged_sample_stops_the_stream_by_shard_key_and_offset(member, make_shards):
    shards = make_shards()
    damage(shards, 20, member)

    with pytest.raises(SampleError, match=r"000001\.tar: .* of 00000020 at byte \d+ is damaged") as told:
        indices(Stream(shards, batch_size=8, seed=0), 5)

    row = shards.row(20)
    assert told.value.key == "00000020"
    assert told.value.member == member
    assert told.value.offset == row.begin + (0 if member == "jpg" else getattr(row, member))


@pytest.mark.parametrize("damaged", [20, 39])
@pytest.mark.parametrize("member", ["jpg", "fgrank"])
def test_a_neighbour_stands_in_the_same_way_on_any_number_of_ranks_and_threads(damaged, member, make_shards, capsys):
    shards = make_shards(classes=3)
    damage(shards, damaged, member)
    neighbour = (damaged + 1) % 40
    options = {"steps": 10, "batch_size": 12, "seed": 0, "substitutes": 1, "flip": True}

    alone, _ = run(shards, world_size=1, threads=1, **options)
    told = capsys.readouterr().err

    assert told.count("\n") == 1
    assert f"{damaged:08d} at byte" in told
    assert "its neighbour stands in (1 of 1)" in told
    for world_size, threads in ((2, 1), (3, 3), (1, 4)):
        assert run(shards, world_size=world_size, threads=threads, **options)[0] == alone
    stand_ins = [row for row in alone if row[1] == np.int64(damaged).tobytes()]
    assert len(stand_ins) == 3
    for row in stand_ins:
        sample = shards.read(neighbour)
        assert row[2] == np.int64(sample.class_id).tobytes()
        assert row[4] in (sample.parts.tobytes(), sample.parts[:, ::-1].tobytes())
        pixels = np.frombuffer(row[3], np.uint8).reshape(32, 32, 3)
        with Image.open(io.BytesIO(sample.jpeg)) as image:
            assert any(np.array_equal(pixels, one) for one in (np.asarray(image), np.asarray(image)[:, ::-1]))


@pytest.mark.parametrize("also", [5, 21])
def test_a_second_damaged_sample_stops_a_stream_that_may_replace_one(also, make_shards, capsys):
    """21 is the neighbour that would stand in for 20."""
    shards = make_shards()
    damage(shards, 20)
    damage(shards, also)

    with pytest.raises(SampleError, match=r"\.tar: jpg of 000000(20|05|21) at byte"):
        indices(Stream(shards, batch_size=8, seed=0, substitutes=1), 5)

    assert capsys.readouterr().err.count("stands in") == 1


def test_two_may_be_replaced_where_two_are_allowed(make_shards, capsys):
    shards = make_shards()
    for index in (20, 21):
        damage(shards, index)

    seen, _ = run(shards, world_size=1, steps=15, batch_size=8, seed=0, substitutes=2)

    neighbour = shards.read(22)
    replaced = [row for row in seen if row[1] in (np.int64(20).tobytes(), np.int64(21).tobytes())]
    assert len(replaced) == 6
    assert all(row[4] == neighbour.parts.tobytes() for row in replaced)
    told = capsys.readouterr().err.splitlines()
    assert [line[-8:] for line in told] == ["(1 of 2)", "(2 of 2)"]


def test_a_whole_stretch_of_damage_stops_even_a_patient_stream(make_shards):
    shards = make_shards()
    for index in range(16, 32):
        damage(shards, index)

    with pytest.raises(ShardError, match=r"the 8 samples from index \d+ on are all damaged"):
        indices(Stream(shards, batch_size=8, seed=0, substitutes=40), 5)


def test_a_lost_shard_has_no_substitute(make_shards):
    shards = make_shards()
    stream = Stream(shards, batch_size=8, seed=0, substitutes=40)
    (shards.path / "shards/000001.tar").unlink()

    with pytest.raises(ShardError, match=r"000001\.tar is missing"):
        indices(stream, 5)


def test_more_shards_than_may_be_open_are_read_by_several_threads(make_shards, monkeypatch):
    shards = make_shards(count=60, samples_per_shard=3)
    meant, _ = run(shards, world_size=1, steps=15, batch_size=12, seed=0, threads=1)
    shards.close()
    monkeypatch.setattr(shard_set, "MOST_OPEN", 2)

    found, _ = run(shards, world_size=1, steps=15, batch_size=12, seed=0, threads=6)

    assert found == meant
    assert len(open_files(shards.path)) <= 2


@settings(deadline=None, max_examples=40)
@given(
    index=st.integers(0, 39),
    member=st.sampled_from(["jpg", "parts", "fgrank"]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_s8_no_flipped_bit_of_a_payload_is_passed_silently(index, member, place, bit, whole):
    row = whole.row(index)
    sizes = {"jpg": row.jpg_size, "parts": 128 + whole.grid**2, "fgrank": 128 + 2 * whole.grid**2}
    at = row.begin + (0 if member == "jpg" else getattr(row, member)) + int(place * sizes[member])
    tar = whole.path / f"shards/{row.shard:06d}.tar"
    data = tar.read_bytes()
    torn = bytearray(data)
    torn[at] ^= 1 << bit

    try:
        tar.write_bytes(torn)
        with pytest.raises(SampleError, match=rf"{tar.name}: {member} of {index:08d} at byte"):
            list(in_order(whole, batch_size=40, threads=1))
        with pytest.raises(SampleError, match=rf"{tar.name}: {member} of {index:08d} at byte"):
            indices(Stream(whole, batch_size=40, seed=0), 1)
    finally:
        tar.write_bytes(data)


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def exchange(one: Path, other: Path) -> None:
    """The bytes of two files, each for the other's."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: cut(folder / "shards/000001.tar", 512), r"000001\.tar has 512 bytes, expected"),
        (lambda folder: cut(folder / "shards/000001.tar", 0), r"000001\.tar has 0 bytes, expected"),
        (lambda folder: cut(folder / "shards/000002.tar", -512), r"000002\.tar has \d+ bytes, expected"),
        (lambda folder: (folder / "shards/000000.tar").unlink(), r"000000\.tar is missing"),
        (lambda folder: cut(folder / "index.parquet", 300), r"index\.parquet is missing or not the one"),
        (lambda folder: (folder / "index.parquet").unlink(), r"index\.parquet is missing or not the one"),
        (
            lambda folder: (folder / "index.parquet").write_bytes((folder / "shards/000000.parquet").read_bytes()),
            r"index\.parquet is missing or not the one dataset\.json names",
        ),
        (lambda folder: cut(folder / "dataset.json", 100), r"dataset\.json is no whole JSON"),
        (lambda folder: (folder / "dataset.json").unlink(), r"no dataset\.json: it is not a shard set"),
        (
            lambda folder: exchange(folder / "shards/000000.tar", folder / "shards/000001.tar"),
            r"00000[01]\.tar",
        ),
    ],
)
def test_s8_no_damaged_file_is_passed_silently(harm, told, make_shards):
    folder = make_shards().path
    harm(folder)

    with pytest.raises(ShardError, match=told), ShardSet.open(folder) as shards:
        indices(Stream(shards, batch_size=8, seed=0), 5)


def test_s8_shards_of_another_build_with_the_same_names_are_not_passed(make_shards):
    """Same sizes, same names, other images: only checksums tell."""
    one, other = make_shards("one"), make_shards("other", seed=1)
    tar = one.path / "shards/000001.tar"
    size = tar.stat().st_size
    tar.write_bytes((other.path / "shards/000001.tar").read_bytes()[:size].ljust(size, b"\0"))

    with pytest.raises(SampleError, match=r"000001\.tar: .* is damaged"):
        indices(Stream(one, batch_size=8, seed=0), 5)


def test_attention_that_is_not_stored_cannot_be_asked_for(make_shards):
    with pytest.raises(ValueError, match="no class attention"):
        Stream(make_shards(), batch_size=8, seed=0, attention=True)
