"""The loop: stop and resume, any number of ranks, and masks that follow the image."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config import PretrainConfig, StreamRun
from pretrain.masking.batch import mask_batch
from pretrain.masking.inputs import Inputs
from pretrain.train import Pretraining, pretrain
from shards.batches import Batch
from shards.errors import ShardError
from shards.shard_set import ShardSet
from training import checkpoint
from training.metrics import read_metrics

TINY = {
    "patch": 8, "embed_dim": 32, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
    "epochs": 2, "warmup_epochs": 0, "batch_size": 12, "base_lr": 1e-2,
}  # fmt: skip


def config(data: Path, out: Path, **changes) -> PretrainConfig:
    run = StreamRun(out=out, device="cpu", precision="fp32")
    return PretrainConfig(data=str(data), run=run, **TINY | changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(checkpoint.find(run))[0]


@pytest.mark.parametrize("stops", [[3], [1, 5]])
def test_stopping_mid_epoch_and_resuming_gives_the_same_losses_bit_for_bit(stops, make_shards, tmp_path):
    data = make_shards().path
    pretrain(config(data, tmp_path / "straight"))

    for stop in stops:
        pretrain(config(data, tmp_path / "stopped"), stop_after_steps=stop)
    pretrain(config(data, tmp_path / "stopped"))

    straight, stopped = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    logged = [[line["loss"] for line in read_metrics(tmp_path / run)] for run in ("straight", "stopped")]
    assert logged[0] == logged[1]


def test_a_finished_run_is_reused(make_shards, tmp_path):
    data = make_shards().path
    first = pretrain(config(data, tmp_path / "run"))
    written = (tmp_path / "run/DONE.json").stat().st_mtime_ns

    assert pretrain(config(data, tmp_path / "run")) == json.loads(json.dumps(first))
    assert (tmp_path / "run/DONE.json").stat().st_mtime_ns == written


def test_no_more_images_than_a_micro_batch_go_through_the_model_at_once(make_shards, tmp_path):
    whole, seen = config(make_shards().path, tmp_path / "run"), []
    pieces = dataclasses.replace(whole, run=dataclasses.replace(whole.run, micro_batch=5))
    with ShardSet.open(pieces.data) as shards:
        task = Pretraining(pieces, shards)
        task.model.register_forward_pre_hook(lambda model, arguments: seen.append(len(arguments[0])))
        task.open(0)
        task.read(0)
        list(task.losses(0))
        task.close()

    assert seen == [5, 5, 2]


def test_masks_go_from_inside_parts_to_whole_parts_as_the_run_goes_on(make_shards, tmp_path):
    settings = config(make_shards(grid=8, size=64).path, tmp_path / "run", batch_size=40)
    with ShardSet.open(settings.data) as shards:
        task = Pretraining(settings, shards)
        task.open(0)
        figures = []
        for step in (0, task.total):
            task.read(step)
            list(task.losses(step))
            figures.append(task.figures(step))
        task.close()

    assert figures[0]["purity"] < 0.1
    assert figures[0]["touched"] == 1
    assert figures[1]["purity"] > 0.7
    assert figures[1]["touched"] < 0.95


def test_no_epochs_leave_an_untrained_encoder(make_shards, tmp_path):
    report = pretrain(config(make_shards().path, tmp_path / "run", epochs=0, masking="random"))

    assert report["steps"] == 0
    assert "encoder.cls_token" in weights(tmp_path / "run")


def test_semantic_masking_without_labels_is_refused(make_shards, tmp_path):
    data = make_shards(groups=1).path

    with pytest.raises(ValueError, match="--masking semmae needs part labels"):
        pretrain(config(data, tmp_path / "run"))


def test_a_mask_that_leaves_nothing_visible_is_refused(make_shards, tmp_path):
    with pytest.raises(ValueError, match="masks 16 of the 16 patches"):
        pretrain(config(make_shards().path, tmp_path / "run", mask_ratio=0.97))


@pytest.mark.parametrize(
    ("most", "more", "told"),
    [
        ({"masking": "semmae", "predicted": 12}, {"predicted": 13}, "more than the 12 patches that are masked"),
        ({"masking": "random", "mask_unit": 3}, {"mask_unit": 4}, "choose one below 4"),
        ({"masking": "attmask-hint", "hint_share": 0.16}, {"hint_share": 0.17}, "at most 1 can be shown; .* 0.083"),
    ],
)
def test_a_setting_that_the_counts_would_cap_is_refused(most, more, told, make_shards, tmp_path):
    data = make_shards(heads=3).path

    pretrain(config(data, tmp_path / "most", **most), stop_after_steps=0)
    with pytest.raises(ValueError, match=told):
        pretrain(config(data, tmp_path / "more", **most | more))


def test_spoilt_weights_stop_the_run_and_leave_the_last_good_checkpoint(make_shards, tmp_path):
    spoilt = config(make_shards().path, tmp_path / "run", base_lr=1e30, epochs=6)
    pretrain(spoilt, stop_after_steps=1)

    with pytest.raises(FloatingPointError, match="gradients of 10 steps in a row are not finite"):
        pretrain(spoilt)

    assert checkpoint.newest(tmp_path / "run") == tmp_path / "run/checkpoints/step-00000001"
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "run").values())


def test_a_checkpoint_says_how_to_rebuild_both_halves(make_shards, tmp_path):
    pretrain(config(make_shards().path, tmp_path / "run"), stop_after_steps=1)

    _, metadata = checkpoint.load_tensors(checkpoint.find(tmp_path / "run"))

    assert {name: metadata["vit"][name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")} == {
        "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2
    }  # fmt: skip
    assert (metadata["mae"]["decoder_dim"], metadata["mae"]["decoder_heads"]) == (16, 2)
    assert {"loss", "lr", "alpha", "purity", "grad_norm"} <= read_metrics(tmp_path / "run")[0].keys()


def test_an_unfinished_shard_set_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(ShardError, match=r"no dataset\.json"):
        pretrain(config(tmp_path / "empty", tmp_path / "run"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("mask_ratio", 1.0), ("mask_ratio", 0.0), ("keep_share", 0.0), ("gamma", -1.0), ("embed_dim", 30)],
        *[("heads", 0), ("depth", 0), ("decoder_depth", -1), ("base_lr", -1.0), ("weight_decay", float("nan"))],
    ],
)
def test_a_setting_out_of_range_is_a_sentence(field, value, tmp_path):
    with pytest.raises(ValueError, match=field):
        config(tmp_path, tmp_path, **{field: value})


def painted_batch(count: int = 8, grid: int = 4, cell: int = 8) -> Batch:
    """Images painted from their labels: a cell of part k has the grey value 20 k."""
    random = np.random.default_rng(0)
    parts = random.integers(0, 5, (count, grid, grid)).astype(np.uint8)
    images = np.repeat(np.repeat(20 * parts, cell, axis=1), cell, axis=2)[..., None].repeat(3, axis=3)
    ranks = np.stack([random.permutation(grid * grid) for _ in range(count)]).astype(np.uint16)
    indices = np.arange(count)
    return Batch(images, parts, ranks.reshape(count, grid, grid), indices, indices, np.zeros(count, np.int64), 0)


def test_a_kept_quarter_is_masked_by_its_own_counts(tmp_path):
    masked = mask_batch(Inputs(painted_batch(), config(tmp_path, tmp_path, keep_share=0.5), 0, (4, 4), 5), 0.0)

    assert masked.ids_masked.shape == (8, 6)
    assert masked.ids_visible.shape == (8, 2)
