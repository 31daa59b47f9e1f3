"""Rules that learned parts have to beat: what each of them says, and that extraction can write it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import photographs

from encoders.frozen import Encoder, Tokens
from encoders.load import load_encoder
from evaluate.parts.metrics import ari
from partlearn.config import ExtractConfig
from partlearn.labelling.baselines import NAMES, Baseline, heads_by_mass, holding
from partlearn.labelling.learned import open_token_labeller
from partlearn.labelling.shard import never_alone
from pipeline.extract import extract
from shards.order import permutation
from shards.shard_set import ShardSet
from shards.verify import verify
from training.config import RunConfig

GRID, PARTS = 8, 6


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("random:vit_tiny_patch16_224", grid=GRID, precision="fp32")


def tokens_of(patches: torch.Tensor, heads: torch.Tensor) -> Tokens:
    class_token = torch.zeros(len(patches), 1, patches.shape[-1])
    return Tokens(class_token[:, 0], patches, torch.cat([class_token, patches], dim=1), heads)


@pytest.fixture
def tokens() -> Tokens:
    """An object in the middle (3 x 8 cells), whose left and right halves differ, before an even background."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.zeros(2, GRID, GRID, 16)
    patches[..., 0] = 1
    patches[:, 2:5, :4] = torch.eye(16)[1] + torch.eye(16)[3]
    patches[:, 2:5, 4:] = torch.eye(16)[2] + torch.eye(16)[3]
    patches = patches.flatten(1, 2) + 0.01 * torch.randn(2, GRID**2, 16, generator=generator)
    return tokens_of(patches, torch.rand(2, 3, GRID**2, generator=generator))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "heads-mass"])
def test_labels_are_parts_on_the_best_cells_and_background_beyond(name, encoder, tokens):
    baseline = Baseline(name, encoder, parts=PARTS)

    parts, rank = baseline.label(tokens)

    background = baseline.shape.parts
    assert baseline.shape.groups == background + 1
    object_cells = (parts < background).sum(dim=1, keepdim=True)
    assert ((parts == background) == (rank >= object_cells)).all()
    assert (object_cells >= round(0.1 * GRID**2)).all()
    assert (object_cells <= round(0.6 * GRID**2)).all()
    assert (parts >= 0).all()
    assert torch.equal(parts, baseline.label(tokens)[0])


def test_heads_are_the_heads_that_attend_most(encoder, tokens):
    baseline = Baseline("heads", encoder, parts=99)

    parts, _ = baseline.label(tokens)

    inside = parts < encoder.heads
    assert baseline.shape.parts == encoder.heads
    assert len(parts[inside].unique()) == encoder.heads
    assert torch.equal(parts[inside], tokens.class_attention.argmax(dim=1)[inside])


def test_heads_by_mass_of_five_cells_by_hand():
    """Two cells hold .6 of the first head's 1.0, two hold .6 of the second's .4; both keep cell 1."""
    attention = torch.tensor([[[0.5, 0.25, 0.125, 0.125, 0.0], [0.05, 0.15, 0.05, 0.05, 0.10]]])
    noise = torch.rand(1, 2, 5)

    kept = holding(attention, 0.6, noise)

    assert kept.tolist() == [[[True, True, False, False, False], [False, True, False, False, True]]]
    assert heads_by_mass(attention, noise).tolist() == [[0, 0, 2, 2, 1]]
    equals = torch.tensor([0.25, 0.5, 0.25, 0.25])
    assert holding(equals, 0.6, torch.tensor([0.3, 0.9, 0.2, 0.4])).tolist() == [False, True, True, False]


def test_the_background_of_heads_by_mass_is_what_no_head_keeps(encoder, tokens):
    baseline = Baseline("heads-mass", encoder, parts=99)

    parts, rank = baseline.label(tokens)

    kept = holding(tokens.class_attention, 0.6, torch.zeros_like(tokens.class_attention))
    heads = tokens.class_attention.argmax(dim=1)
    assert baseline.shape.parts == encoder.heads
    assert torch.equal(parts == encoder.heads, ~kept.any(dim=1))
    assert torch.equal(rank, Baseline("heads", encoder, parts=99).label(tokens)[1])
    assert torch.equal(parts[kept.all(dim=1)], heads[kept.all(dim=1)])


@pytest.mark.parametrize("name", ["heads", "kmeans-image"])
def test_a_shuffled_image_has_the_labels_of_the_next(name, encoder, tokens):
    parts, rank = Baseline(name, encoder, parts=PARTS).label(tokens)

    shuffled, ranks = Baseline(f"shuffled-{name}", encoder, parts=PARTS).label(tokens)

    assert not torch.equal(parts[0], parts[1])
    assert torch.equal(shuffled, parts[[1, 0]])
    assert torch.equal(ranks, rank[[1, 0]])


def test_one_image_has_no_next(encoder, tokens):
    alone = tokens_of(tokens.patch_tokens[:1], tokens.class_attention[:1])

    with pytest.raises(ValueError, match="at least two, got 1"):
        Baseline("shuffled-heads", encoder, parts=PARTS).label(alone)


def extraction(images: Path, out: Path, parts: str, **changes) -> ExtractConfig:
    settings = {"encoder": "random:vit_tiny_patch16_224", "grid": 4, "size": 32, "backend": "local"} | changes
    run = RunConfig(out=out, device="cpu", precision="fp32")
    return ExtractConfig(images=str(images), parts=Path(parts), run=run, **settings)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_image_left_alone_joins_the_others_and_all_have_labels_of_another(batch_size, tmp_path):
    """Six images in batches of four and two, of which the fifth in order turns out to be no image."""
    photos = photographs(tmp_path / "photos", 6)
    torn = photos / f"{permutation(6, seed=0, epoch=0)[4]:03d}.jpg"
    torn.write_bytes(b"no image")

    extract(extraction(photos, tmp_path / "own", "heads", attention=True))
    extract(extraction(photos, tmp_path / "set", "shuffled-heads", attention=True, batch_size=batch_size))

    with ShardSet.open(tmp_path / "own") as own, ShardSet.open(tmp_path / "set") as shuffled:
        assert len(shuffled) == 5
        samples = [[shards.read(i, attention=True) for i in range(5)] for shards in (own, shuffled)]
    labels = [[sample.parts.tobytes() for sample in one] for one in samples]
    confidence = [pq.read_table(tmp_path / name / "index.parquet")["confidence"].to_pylist() for name in ("own", "set")]
    assert len(set(labels[0])) == 5
    donors = [labels[0].index(one) for one in labels[1]]
    assert sorted(donors) == [0, 1, 2, 3, 4]
    assert all(donor != place for place, donor in enumerate(donors))
    assert confidence[1] == [confidence[0][donor] for donor in donors]
    for place, donor in enumerate(donors):
        of_another, own = samples[1][place], samples[0][donor]
        assert np.array_equal(of_another.fgrank, own.fgrank)
        assert np.array_equal(of_another.attn, own.attn)
        assert of_another.attn_peak == pytest.approx(own.attn_peak, rel=1e-5)


def test_the_only_image_of_a_shard_is_rejected_with_the_reason(tmp_path):
    info = extract(
        extraction(photographs(tmp_path / "photos", 5), tmp_path / "set", "shuffled-heads", samples_per_shard=4)
    )

    assert (info["samples"], info["rejected"]) == (4, 1)
    rejected = pq.read_table(tmp_path / "set" / "rejected.parquet").to_pylist()[0]
    assert (rejected["ordinal"], rejected["step"]) == (4, "label")
    assert rejected["reason"] == "shuffled-heads needs another image, and no other of its shard can be read"
    assert verify(tmp_path / "set", "deep") == []


def test_batches_of_every_size_hold_all_images_in_order_and_none_alone():
    for size in range(1, 6):
        for count in range(2, 14):
            images: list = list(range(count))
            batches = list(never_alone((images[i : i + size] for i in range(0, count, size)), size))
            assert [image for batch in batches for image in batch] == images
            assert all(2 <= len(batch) <= max(2, size) + 1 for batch in batches)


@pytest.mark.parametrize("count", [0, 256])
def test_a_count_whose_labels_fit_no_byte_is_refused(count, tmp_path):
    with pytest.raises(ValueError, match=rf"num_parts must lie between 1 and 255 \(labels are bytes\), got {count}"):
        extraction(tmp_path, tmp_path / "set", "regions", num_parts=count)


def test_the_rule_of_heads_by_mass_names_its_mass(encoder):
    assert Baseline("heads-mass", encoder, parts=99).describe()["mass"] == 0.6
    assert "mass" not in Baseline("heads", encoder, parts=99).describe()


@pytest.mark.parametrize("name", ["kmeans-image", "regions"])
def test_where_the_object_has_fewer_cells_than_parts_each_is_a_part(name, encoder, tokens):
    parts, _ = Baseline(name, encoder, parts=200).label(tokens)

    for labels in parts:
        inside = labels[labels < 200]
        assert sorted(inside.tolist()) == list(range(len(inside)))


def test_kmeans_of_an_image_finds_the_parts_of_its_object(encoder, tokens):
    parts, _ = Baseline("kmeans-image", encoder, parts=2).label(tokens)

    halves = (torch.arange(GRID) >= 4).long().expand(GRID, GRID).flatten()
    for labels in parts:
        assert ari(labels[labels < 2].numpy(), halves[labels < 2].numpy()) == 1


def test_bands_are_stripes_and_a_grid_is_rectangles(encoder, tokens):
    bands, _ = Baseline("bands", encoder, parts=4).label(tokens)
    grid, _ = Baseline("grid", encoder, parts=6).label(tokens)

    rows = torch.arange(GRID)[:, None].expand(GRID, GRID).flatten()
    cols = torch.arange(GRID)[None].expand(GRID, GRID).flatten()
    inside = bands[0] < 4
    assert torch.equal(bands[0][inside], (rows * 4 // GRID)[inside])
    assert torch.equal(grid[0][inside], ((cols * 2 // GRID) * 3 + rows * 3 // GRID)[inside])


@pytest.mark.parametrize("parts", [5, 7])
def test_a_grid_of_a_prime_number_of_parts_is_compact_rectangles_too(parts):
    fine = load_encoder("random:vit_tiny_patch16_224", grid=28, precision="fp32")
    tokens = tokens_of(torch.randn(2, 28**2, 16), torch.rand(2, 3, 28**2))

    grid, bands = (
        Baseline(name, fine, parts=parts, foreground_share=1.0).label(tokens)[0][0].reshape(28, 28)
        for name in ("grid", "bands")
    )

    assert grid.unique().tolist() == bands.unique().tolist() == list(range(parts))
    assert not torch.equal(grid, bands)
    for part in range(parts):
        rows, cols = (places.unique() for places in (grid == part).nonzero(as_tuple=True))
        assert len(rows) * len(cols) == (grid == part).sum(), "no rectangle"
        assert max(len(rows), len(cols)) <= 2 * min(len(rows), len(cols)), "not compact"
        assert (grid == part).sum().item() == pytest.approx(28**2 / parts, rel=0.15)


def test_regions_are_compact_and_another_draw_in_another_image(encoder, tokens):
    parts, rank = Baseline("regions", encoder, parts=3).label(tokens)

    assert not torch.equal(rank[0], rank[1])
    assert not torch.equal(parts[0], parts[1])
    for labels in parts:
        places = [(labels == part).nonzero().squeeze(1) for part in range(3)]
        centres = torch.stack([torch.stack([at // GRID, at % GRID], 1).float().mean(0) for at in places])
        assert all(len(at) for at in places)
        for part, at in enumerate(places):  # a cell lies nearest to its own region's centre, or nearly so
            near = torch.cdist(torch.stack([at // GRID, at % GRID], 1).float(), centres)
            assert (near[:, part] <= near.min(dim=1).values + 2).all()


def test_extraction_writes_a_baseline_and_says_which(tmp_path):
    info = extract(extraction(photographs(tmp_path / "photos", 5), tmp_path / "set", "regions", num_parts=3))

    assert verify(tmp_path / "set", "deep") == []
    assert (info["groups"], info["producer"]["labels"]["baseline"]) == (4, "regions")
    with ShardSet.open(tmp_path / "set") as shards:
        assert {label for i in range(5) for label in np.unique(shards.read(i).parts)} == {0, 1, 2, 3}


def test_a_baseline_reads_the_block_that_is_asked_for(tmp_path):
    photos = photographs(tmp_path / "photos", 3)

    labels = [
        extract(extraction(photos, tmp_path / f"set-{block}", "kmeans-image", encoder_block=block))["producer"][
            "labels"
        ]
        for block in (2, 9)
    ]

    assert [one["encoder"]["block"] for one in labels] == [2, 9]


def test_a_baseline_without_an_encoder_is_a_sentence():
    with pytest.raises(ValueError, match="the baseline grid needs an --encoder"):
        open_token_labeller("grid")
