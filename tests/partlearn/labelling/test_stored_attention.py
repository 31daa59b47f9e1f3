"""Class attention as it is stored: bytes of each head's own peak, and the peaks, which make heads comparable again."""

import io
import re
import shlex
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import tyro
from conftest import drawn, photographs, write_samples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from encoders.load import load_encoder
from partlearn.config import ExtractConfig
from partlearn.labelling.learned import attention_bytes
from pipeline.config import VerifyConfig
from pipeline.extract import HOW, extract
from pipeline.help import made, shown
from pipeline.verify import verify as verify_verb
from shards.atomic import read_json, sha256_file, write_json
from shards.crops import crop_cells, sample_boxes, sample_flips
from shards.index import table_bytes
from shards.info import digests, fingerprint
from shards.sample import attention_of
from shards.shard_set import ShardSet
from shards.stream import Stream
from shards.verify import verify
from training.config import RunConfig
from training.same_run import as_json

ENCODER, GRID, HEADS = "random:vit_tiny_patch16_224", 4, 3


def settings(out: Path, **changes) -> ExtractConfig:
    run = RunConfig(out=out, device="cpu", precision="fp32")
    options = {"parts": Path("heads"), "encoder": ENCODER, "grid": GRID, "batch_size": 4, "backend": "local"} | changes
    return ExtractConfig(run=run, **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Ten images in two shards, with class attention."""
    folder = tmp_path_factory.mktemp("stored")
    photos = str(photographs(folder / "photos", 10))
    extract(settings(folder / "set", images=photos, size=64, samples_per_shard=5, attention=True))
    return folder / "set"


@pytest.fixture
def earlier(stored, tmp_path) -> Path:
    """The same set as an earlier release left it: no peaks in any index."""
    folder = Path(shutil.copytree(stored, tmp_path / "earlier"))
    for sidecar in sorted((folder / "shards").glob("*.json")):
        index = sidecar.with_suffix(".parquet")
        index.write_bytes(table_bytes(pq.read_table(index).drop_columns("attn_peak")))
        told = {"bytes": index.stat().st_size, "sha256": sha256_file(index)}
        write_json(sidecar, read_json(sidecar) | {"index": told})
    reindexed(folder, pq.read_table(folder / "index.parquet").drop_columns("attn_peak"))
    info = read_json(folder / "dataset.json")
    write_json(folder / "dataset.json", {name: info[name] for name in info if name not in ("plan", "digests")})
    return folder


def reindexed(folder: Path, table: pa.Table) -> None:
    """The set with another index, of which dataset.json tells."""
    (folder / "index.parquet").write_bytes(table_bytes(table))
    info = read_json(folder / "dataset.json") | {"index_sha256": sha256_file(folder / "index.parquet")}
    info["fingerprint"] = fingerprint(info)
    write_json(folder / "dataset.json", info | {"digests": digests(info)})


def of_encoder(shards: ShardSet) -> np.ndarray:
    """Class attention of every stored image, computed once more."""
    images = np.stack([np.asarray(Image.open(io.BytesIO(shards.read(i).jpeg))) for i in range(len(shards))])
    encoder = load_encoder(ENCODER, grid=GRID, precision="fp32")
    return encoder(torch.from_numpy(images)).class_attention.reshape(-1, HEADS, GRID, GRID).numpy()


def test_with_their_peaks_heads_and_their_mean_are_the_encoders_to_a_255th(stored):
    with ShardSet.open(stored) as shards:
        meant = of_encoder(shards)
        samples = [shards.read(index, attention=True) for index in range(len(shards))]

    attn, peaks = (np.stack([getattr(sample, name) for sample in samples]) for name in ("attn", "attn_peak"))
    found = attention_of(attn, peaks)
    most = meant.max(axis=(2, 3))
    assert peaks == pytest.approx(most, rel=1e-5)
    assert len(np.unique(peaks)) == 10 * HEADS
    assert (np.abs(found - meant) <= most[..., None, None] * (0.5 / 255 + 1e-5)).all()
    assert (np.abs(found.mean(axis=1) - meant.mean(axis=1)) <= most.max(axis=1)[:, None, None] / 255).all()
    assert not np.array_equal(attn.argmax(axis=1), found.argmax(axis=1)), "bytes alone would compare the heads as well"


def test_a_stream_gives_the_encoders_attention_cropped_and_mirrored_with_the_image(stored):
    with ShardSet.open(stored) as shards:
        meant = of_encoder(shards)
        stream = iter(Stream(shards, batch_size=8, seed=2, flip=True, crop_scale=0.3, attention=True))
        taken = list(islice(stream, 3))
        stream.close()

    for batch in taken:
        flips = sample_flips(2, batch.epochs, batch.indices)
        boxes = sample_boxes(2, batch.epochs, batch.indices, size=64, scale=0.3)
        assert batch.attention.dtype == np.float32
        for row, index in enumerate(batch.indices):
            cut = crop_cells(meant[index], tuple(boxes[row].tolist()), size=64)
            within = meant[index].max(axis=(1, 2))[:, None, None] * (0.5 / 255 + 1e-5)
            assert (np.abs(batch.attention[row] - (cut[..., ::-1] if flips[row] else cut)) <= within).all()


def test_peaks_come_from_the_labels_that_are_laid_over_a_set(stored, tmp_path):
    extract(settings(tmp_path / "labels", relabel=stored, grid=2, attention=True))

    with ShardSet.open(stored, labels=tmp_path / "labels") as both, ShardSet.open(tmp_path / "labels") as labels:
        seen = both.read(3, attention=True)
        assert seen.attn.shape == (HEADS, 2, 2)
        assert seen.attn_peak.tolist() == labels.peaks[3].tolist() != ShardSet.open(stored).peaks[3].tolist()
    assert verify(tmp_path / "labels", "deep") == []


def test_a_set_without_attention_has_neither_peaks_nor_their_column(stored, tmp_path):
    photos = str(stored.parent / "photos")
    extract(settings(tmp_path / "set", images=photos, size=64))

    assert "attn_peak" not in pq.read_schema(tmp_path / "set/index.parquet").names
    with ShardSet.open(tmp_path / "set") as shards:
        assert shards.peaks is None
        with pytest.raises(
            ValueError, match=r"holds? no class attention; make it with `semmae extract --relabel .* --parts heads"
        ):
            Stream(shards, batch_size=4, seed=0, attention=True)


OF_LABELS = ("parts", "encoder", "encoder_block", "encoder_mean", "encoder_std", "num_parts", "grid")


@pytest.mark.parametrize(
    ("made_with", "told"),
    [
        ({"parts": Path("builtin")}, ""),
        ({"parts": Path("runs/my parts"), "grid": 14}, ""),
        (
            {"encoder": "dino:FILE", "encoder_block": 0, "num_parts": 4}
            | {"encoder_mean": (0.5, 0.4, 0.5), "encoder_std": (0.5, 0.5, 0.2)},
            "",
        ),
        ({"parts": Path("truth")}, "; its labels are then those of `builtin`"),
        ({"parts": Path("builtin"), "boxes": Path("boxes.txt")}, "; its labels are then those of `builtin`"),
    ],
)
def test_the_command_that_makes_attention_is_accepted_and_makes_the_same_labels(made_with, told, tmp_path):
    config = settings(tmp_path, images="photos", **{"encoder": None, "grid": None} | made_with)
    recorded = {name: value for name, value in as_json(config).items() if name not in HOW}
    info = {"grid": 4, "groups": 4, "size": 32, "classes": [], "producer": {"config": recorded}}
    write_samples(tmp_path / "a set", drawn(2, 32, 4, 4, 0, 0), info, samples_per_shard=2)

    with ShardSet.open(tmp_path / "a set") as shards, pytest.raises(ValueError) as refused:
        shards.refuse_no_attention()

    sentence = re.fullmatch("the labels of .* `semmae extract (.*)` and take --labels DIR(.*)", str(refused.value))
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
    named = made(tyro.cli(shown(ExtractConfig), args=shlex.split(sentence[1]), config=flat))
    plain = settings(tmp_path, images="photos", parts=Path("builtin"), encoder=None, grid=None)
    wanted = plain if told else config
    assert (named.relabel, named.attention, sentence[2]) == (tmp_path / "a set", True, told)
    assert [getattr(named, name) for name in OF_LABELS] == [getattr(wanted, name) for name in OF_LABELS]


def test_a_set_of_an_earlier_release_is_read_and_verified_and_says_how_peaks_are_made(earlier, tmp_path):
    assert verify(earlier, "deep") == []
    with ShardSet.open(earlier) as shards:
        assert shards.read(0, attention=True).attn.shape == (HEADS, GRID, GRID)
        assert shards.read(0, attention=True).attn_peak is None
        assert len(next(iter(Stream(shards, batch_size=4, seed=0))).images) == 4
        with pytest.raises(ValueError, match="without its heads' peaks") as refused:
            Stream(shards, batch_size=4, seed=0, attention=True)
    assert f"`semmae extract --relabel {earlier} --parts heads --encoder {ENCODER} --grid {GRID} --attention" in str(
        refused.value
    )

    extract(settings(tmp_path / "again", relabel=earlier, attention=True))

    with ShardSet.open(earlier, labels=tmp_path / "again") as shards:
        assert next(iter(Stream(shards, batch_size=4, seed=0, attention=True))).attention.max() < 1


def test_g5_a_repaired_set_of_an_earlier_release_keeps_its_fingerprint(earlier):
    before = read_json(earlier / "dataset.json")["fingerprint"]
    (earlier / "shards/000001.tar").unlink()

    verify_verb(VerifyConfig(data=earlier, level="deep", repair=True))

    assert read_json(earlier / "dataset.json")["fingerprint"] == before


@pytest.mark.parametrize(
    ("peaks", "sentence"),
    [
        ([0.5, 1.5, 0.5], "peaks at"),
        ([0.5, float("nan"), 0.5], "peaks at"),
        ([-0.1, 0.5, 0.5], "peaks at"),
        ([0.5, 0.0, 0.5], "is not the 255"),
    ],
)
def test_a_peak_that_cannot_be_is_found_and_its_sample_named(peaks, sentence, stored, tmp_path):
    folder = Path(shutil.copytree(stored, tmp_path / "set"))
    table = pq.read_table(folder / "index.parquet")
    column = table["attn_peak"].to_pylist()
    column[7] = peaks
    at = table.column_names.index("attn_peak")
    reindexed(folder, table.set_column(at, "attn_peak", pa.array(column, pa.list_(pa.float32()))))

    faults = verify(folder, "deep")

    assert [(fault.shard, fault.key) for fault in faults] == [("000001.tar", "00000007")]
    assert sentence in faults[0].what


@given(
    exponents=st.lists(st.lists(st.floats(-40, 0), min_size=4, max_size=4), min_size=1, max_size=5),
    silent=st.booleans(),
)
def test_bytes_and_peak_are_the_attention_to_half_a_255th_of_the_peak(exponents, silent):
    attention = 10 ** torch.tensor(exponents)
    attention[0] *= not silent

    bytes_, peaks = attention_bytes(attention[None]), attention.amax(dim=1)

    found = attention_of(bytes_[0].reshape(-1, 2, 2).numpy(), peaks.numpy()).reshape(-1, 4)
    within = peaks.numpy()[:, None] * (0.5 / 255 + 1e-5)
    assert (np.abs(found - attention.numpy()) <= within).all()
    assert bytes_[0].amax(dim=1).tolist() == [255 * (peak > 0) for peak in peaks.tolist()]
