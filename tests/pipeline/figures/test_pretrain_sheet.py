"""The sheet of a pretraining: it shows the seed's samples and no others, and what it hides is what the masks hide."""

import dataclasses
import io
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from reference import mae_step

from pipeline.figures.pretrain_sheet import COLUMNS, draw_sheet
from pipeline.figures.samples import pick
from pretrain.config import PretrainConfig, StreamRun
from pretrain.pictures import BLANK
from pretrain.train import pretrain
from shards.batches import in_order
from shards.order import permutation
from shards.shard_set import ShardSet
from training.contact_sheet import CELL, GAP, HEADER, ROWS

MODEL = {"patch": 8, "embed_dim": 32, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def test_the_samples_shown_are_the_first_of_the_seeds_order(make_shards):
    shards = make_shards(count=40)
    (whole,) = in_order(shards, batch_size=40)

    shown = pick(shards, ROWS, seed=3)

    wanted = sorted(permutation(40, seed=3, epoch=0)[:ROWS].tolist())
    assert shown.indices.tolist() == wanted
    for name in ("images", "parts", "fgrank", "class_ids"):
        assert np.array_equal(getattr(shown, name), getattr(whole, name)[wanted])


def test_a_sheet_reads_no_sample_that_it_does_not_show(make_shards, tmp_path):
    """All other images of the set are spoilt, and nobody notices."""
    shards = make_shards(count=40, samples_per_shard=5)
    out = tmp_path / "run"
    run = StreamRun(out=out, device="cpu", precision="fp32")
    pretrain(PretrainConfig(data=str(shards.path), epochs=0, warmup_epochs=0, batch_size=4, **MODEL, run=run))
    wanted = set(permutation(40, seed=0, epoch=0)[:ROWS].tolist())
    for index in set(range(40)) - wanted:
        row = shards.row(index)
        with open(shards.path / "shards" / f"{row.shard:06d}.tar", "r+b") as tar:
            tar.seek(row.begin + row.jpg_size // 2)
            tar.write(b"spoilt")

    draw_sheet(tmp_path / "sheet.png", shards=ShardSet.open(shards.path), run=out, seed=0)

    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == GAP + len(COLUMNS) * (CELL + GAP)
        rows = np.asarray(sheet)[-ROWS * (CELL + GAP) :]
    assert all(rows[n * (CELL + GAP) : n * (CELL + GAP) + CELL, :CELL].std() > 5 for n in range(ROWS))


def patches(sheet: Image.Image, column: int, row: int) -> list[tuple[int, ...]]:
    """The middle pixel of each of the 4 x 4 patches of a tile."""
    left, top = GAP + (CELL + GAP) * column, HEADER + (CELL + GAP) * row
    middles = [CELL // 8 + CELL // 4 * place for place in range(4)]
    return [sheet.getpixel((left + x, top + y)) for y in middles for x in middles]


def test_each_column_shows_the_images_their_masks_of_that_progress_and_what_was_visible(make_shards, tmp_path):
    shards, run = make_shards(count=24), StreamRun(out=tmp_path / "run", device="cpu", precision="fp32")
    small = {"embed_dim": 16, "depth": 1, "heads": 1, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 1}
    config = PretrainConfig(data=str(shards.path), patch=8, epochs=0, keep_share=0.75, seed=2, run=run, **small)
    pretrain(config)

    sheet = Image.open(draw_sheet(tmp_path / "sheet.png", shards=shards, run=run.out, seed=4))

    stored = dataclasses.replace(config, flip=False)
    for row, index in enumerate(sorted(permutation(24, seed=4, epoch=0)[:ROWS].tolist())):
        sample = shards.read(index)
        image = patches(sheet, COLUMNS.index("image"), row)
        pixels = np.array(Image.open(io.BytesIO(sample.jpeg)).resize((CELL, CELL), Image.Resampling.NEAREST))
        middles = [CELL // 8 + CELL // 4 * place for place in range(4)]
        assert image == [tuple(pixels[y, x].tolist()) for y in middles for x in middles]
        shade = [1 - 0.9 * rank / 16 for rank in sample.fgrank.flatten().tolist()]
        for seen, colour, share in zip(patches(sheet, COLUMNS.index("foreground"), row), image, shade, strict=True):
            assert seen == pytest.approx([share * value for value in colour], abs=1)
        for name, progress in (("mask at 0 %", 0), ("at 50 %", Fraction(1, 2)), ("at 100 %", 1)):
            _, visible, _ = mae_step.shown(sample, stored, shards.groups, epoch=0, progress=Fraction(progress))
            tile = patches(sheet, COLUMNS.index(name), row)
            assert [patch for patch, colour in enumerate(tile) if colour != (BLANK,) * 3] == visible
            rebuilt = {"mask at 0 %": "rebuilt (0 %)", "at 100 %": "rebuilt (100 %)"}.get(name)
            if rebuilt:
                again = patches(sheet, COLUMNS.index(rebuilt), row)
                for patch in visible:
                    assert max(abs(a - b) for a, b in zip(again[patch], image[patch], strict=True)) <= 1


@pytest.mark.parametrize(
    ("masking", "settings"), [("hpm", {"hard_share": 1.0}), ("automae", {}), ("color-noise", {"noise_color": "red"})]
)
def test_a_run_of_another_masking_is_shown_as_one_of_parts_would_be(masking, settings, make_shards, tmp_path):
    """Without a step their weights are the same, and so is all that is shown of them."""
    shards, sheets = make_shards(heads=2), []
    for name, changes in (("semmae", {}), (masking, settings)):
        run = StreamRun(out=tmp_path / name, device="cpu", precision="fp32")
        asked = {"masking": name, "mask_ratio": 0.5, "keep_share": 0.75, "epochs": 0, **MODEL, **changes}
        pretrain(PretrainConfig(data=str(shards.path), run=run, **asked))
        sheets.append(draw_sheet(tmp_path / f"{name}.png", shards=shards, run=run.out, seed=0))

    assert sheets[0].read_bytes() == sheets[1].read_bytes()
