"""The sheet of a pretraining run."""

import numpy as np
from PIL import Image

from pipeline.figures.pretrain_sheet import COLUMNS, _pick, draw_sheet
from pretrain.config import PretrainConfig, StreamRun
from pretrain.train import pretrain
from shards.batches import in_order
from shards.order import permutation
from shards.shard_set import ShardSet
from training.contact_sheet import CELL, GAP, ROWS

MODEL = {"patch": 8, "embed_dim": 32, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def test_the_samples_shown_are_the_first_of_the_seeds_order(make_shards):
    shards = make_shards(count=40)
    (whole,) = in_order(shards, batch_size=40)

    shown = _pick(shards, seed=3)

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
