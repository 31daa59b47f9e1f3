"""Rules that learned parts have to beat: what each of them says, and that extraction can write it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photographs

from evaluate.part_quality import ari
from partlearn.baselines import NAMES, Baseline, heads_by_mass, holding, refuse_lone_pictures
from partlearn.config import ExtractConfig
from partlearn.encoders import Encoder, Tokens, load_encoder
from partlearn.label import Labeller
from pipeline.extract import extract
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
    assert torch.equal(parts[inside], tokens.class_attention.argmax(dim=1)[inside])


def test_heads_by_mass_of_five_cells_by_hand():
    """Two cells hold .6 of the first head's 1.0, two hold .6 of the second's .4; both keep cell 1."""
    attention = torch.tensor([[[0.5, 0.25, 0.125, 0.125, 0.0], [0.05, 0.15, 0.05, 0.05, 0.10]]])

    kept = holding(attention, 0.6)

    assert kept.tolist() == [[[True, True, False, False, False], [False, True, False, False, True]]]
    assert heads_by_mass(attention).tolist() == [[0, 0, 2, 2, 1]]
    assert holding(torch.tensor([0.25, 0.5, 0.25, 0.25]), 0.6).tolist() == [True, True, False, False]


def test_the_background_of_heads_by_mass_is_what_no_head_keeps(encoder, tokens):
    baseline = Baseline("heads-mass", encoder, parts=99)

    parts, rank = baseline.label(tokens)

    kept = holding(tokens.class_attention, 0.6)
    heads = tokens.class_attention.argmax(dim=1)
    assert baseline.shape.parts == encoder.heads
    assert torch.equal(parts == encoder.heads, ~kept.any(dim=1))
    assert torch.equal(rank, Baseline("heads", encoder, parts=99).label(tokens)[1])
    assert torch.equal(parts[kept.all(dim=1)], heads[kept.all(dim=1)])


@pytest.mark.parametrize("name", ["heads", "kmeans-image"])
def test_a_shuffled_picture_has_the_labels_of_the_next(name, encoder, tokens):
    parts, rank = Baseline(name, encoder, parts=PARTS).label(tokens)

    shuffled, ranks = Baseline(f"shuffled-{name}", encoder, parts=PARTS).label(tokens)

    assert not torch.equal(parts[0], parts[1])
    assert torch.equal(shuffled, parts[[1, 0]])
    assert torch.equal(ranks, rank[[1, 0]])


def test_one_picture_has_no_next(encoder, tokens):
    alone = tokens_of(tokens.patch_tokens[:1], tokens.class_attention[:1])

    with pytest.raises(ValueError, match="at least two, got 1"):
        Baseline("shuffled-heads", encoder, parts=PARTS).label(alone)


@pytest.mark.parametrize(("samples_per_shard", "batch_size"), [(5, 4), (4, 4), (5, 1)])
def test_a_build_whose_shards_end_with_one_picture_alone_does_not_start(samples_per_shard, batch_size, tmp_path):
    settings = {"encoder": "random:vit_tiny_patch16_224", "grid": 4, "size": 32, "backend": "local"}
    run = RunConfig(out=tmp_path / "set", device="cpu", precision="fp32")
    config = ExtractConfig(
        images=str(photographs(tmp_path / "photos", 5)),
        parts=Path("shuffled-heads"),
        samples_per_shard=samples_per_shard,
        batch_size=batch_size,
        run=run,
        **settings,
    )

    option = "--samples-per-shard" if samples_per_shard == 4 else "--batch-size"
    with pytest.raises(
        ValueError, match=rf"shuffled-heads takes .* would have a batch of one; choose another {option}"
    ):
        extract(config)

    assert not (tmp_path / "set").exists()


def test_batches_of_two_and_more_and_labels_of_their_own_are_no_reason_to_refuse():
    refuse_lone_pictures("shuffled-heads", [6, 6, 2], 4)
    refuse_lone_pictures("heads", [5, 1], 4)


def test_kmeans_of_a_picture_finds_the_parts_of_its_object(encoder, tokens):
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
    assert torch.equal(grid[0][inside], ((rows * 3 // GRID) * 2 + cols * 2 // GRID)[inside])


def test_regions_are_compact_and_another_draw_in_another_picture(encoder, tokens):
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
    photos = photographs(tmp_path / "photos", 5)
    run = RunConfig(out=tmp_path / "set", device="cpu", precision="fp32")
    config = ExtractConfig(
        images=str(photos),
        parts=Path("regions"),
        encoder="random:vit_tiny_patch16_224",
        grid=4,
        count=3,
        size=32,
        backend="local",
        run=run,
    )

    info = extract(config)

    assert verify(tmp_path / "set", "deep") == []
    assert (info["groups"], info["producer"]["labels"]["baseline"]) == (4, "regions")
    with ShardSet.open(tmp_path / "set") as shards:
        assert {label for i in range(5) for label in np.unique(shards.read(i).parts)} == {0, 1, 2, 3}


def test_a_baseline_without_an_encoder_is_a_sentence():
    with pytest.raises(ValueError, match="the baseline grid needs an --encoder"):
        Labeller("grid")
