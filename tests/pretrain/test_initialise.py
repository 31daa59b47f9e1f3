"""`--init`: other people's weights and our own in a pretraining's model."""

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from conftest import drawn, write_samples
from layouts import small_vit
from reference import mae_official
from timm.models.vision_transformer import VisionTransformer
from watch import watching

from encoders.weights import resize_positions
from pretrain.config import PretrainConfig, StreamRun
from pretrain.initialise import initialise
from pretrain.mae import MAE, patchify
from pretrain.train import pretrain
from training import checkpoint
from training.augment import IMAGENET_MEAN, IMAGENET_STD
from training.checkpoint import CheckpointError, write_tensors

PLAIN = {"size": 32, "patch": 8, "embed_dim": 64, "depth": 1, "heads": 1}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 1}
OFFICIAL = mae_official.drawn(dim=64, depth=1, patch=8, side=4, decoder_dim=32, decoder_depth=1)


def saved(path: Path, weights: dict[str, torch.Tensor]) -> str:
    """As MAE's training saves it. Its ViTs have names of timm; one that small has none, and iBOT's are as plain."""
    torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(model="mae_vit_base_patch16")}, path)
    return f"ibot:{path}"


def decoder_of(model: MAE) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("encoder.")}


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_on_an_official_file_is_that_of_maes_own_layout(norm_pix, tmp_path):
    sizes = {"depth": 12, "patch": 16, "decoder_dim": 64, "decoder_depth": 2}
    weights = mae_official.drawn(dim=192, side=3, **sizes)
    torch.save({"model": weights, "epoch": 799}, tmp_path / "mae.pth")
    model = MAE(size=48, embed_dim=192, heads=3, decoder_heads=2, norm_pix_loss=norm_pix, **sizes)

    told = initialise(model, f"timm:vit_tiny_patch16_224={tmp_path / 'mae.pth'}")

    images, orders = torch.randn(2, 3, 48, 48), [torch.randperm(9).tolist() for _ in range(2)]
    ids = torch.tensor(orders)
    expected = [
        mae_official.loss(weights, image, order, kept=3, heads=(3, 2), norm_pix=norm_pix)
        for image, order in zip(images, orders, strict=True)
    ]
    assert model(images, ids[:, :3], ids[:, 3:]).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert told.endswith("encoder taken, its positions as stored; decoder taken")


def test_a_file_without_a_decoder_leaves_the_drawn_one(tmp_path):
    encoder = {name: value for name, value in OFFICIAL.items() if "decoder" not in name and name != "mask_token"}
    model = MAE(**PLAIN, **DECODER)
    before = decoder_of(model)

    told = initialise(model, saved(tmp_path / "mae.pth", encoder))

    taken, after = model.encoder.state_dict(), decoder_of(model)
    assert all(torch.equal(taken[name], value) for name, value in encoder.items())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert told.endswith("decoder drawn from the seed (the source has no decoder)")


SWAPPED = OFFICIAL["decoder_pos_embed"].roll(16, dims=2)
WITHOUT = {name: value for name, value in OFFICIAL.items() if name != "mask_token"}


@pytest.mark.parametrize(
    ("weights", "changes", "why"),
    [
        (OFFICIAL, {"decoder_depth": 2}, "there it is 1 blocks of width 32 with 1 heads on 16 patches, here 2 blocks"),
        (OFFICIAL, {"decoder_heads": 2}, "with 1 heads on 16 patches, here 1 blocks of width 32 with 2 heads"),
        (OFFICIAL, {"size": 48}, "on 16 patches, here 1 blocks of width 32 with 1 heads on 36 patches"),
        (OFFICIAL | {"decoder_pos_embed": SWAPPED}, {}, "there it has other positions than MAE's"),
        (WITHOUT, {}, r"there it has no mask_token of \(1, 1, 32\)"),
    ],
)
def test_a_decoder_that_does_not_fit_is_drawn_and_the_reason_told(weights, changes, why, tmp_path):
    model = MAE(**PLAIN | DECODER | changes)
    before = decoder_of(model)

    told = initialise(model, saved(tmp_path / "mae.pth", weights))

    after = decoder_of(model)
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, OFFICIAL["blocks.0.attn.qkv.weight"])
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert why.replace("\\", "") in told


def test_positions_of_another_grid_are_resampled_and_stay_fixed(tmp_path):
    model = MAE(**PLAIN | {"size": 48}, **DECODER)

    told = initialise(model, saved(tmp_path / "mae.pth", OFFICIAL))

    assert torch.equal(model.encoder.pos_embed, resize_positions(OFFICIAL["pos_embed"], prefix=1, grid=6))
    assert not model.encoder.pos_embed.requires_grad
    assert "positions 4x4 to 6x6, bicubic" in told


def run_file(path: Path, weights: dict[str, torch.Tensor], **told) -> str:
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    vit |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    write_tensors(path, weights, {"vit": vit | told})
    return f"run:{path}"


def test_pixels_normalised_otherwise_are_embedded_to_the_same_tokens(tmp_path):
    """Weights that want mean 0.5 get pixels with ImageNet's, as every image of a pretraining is."""
    weights, pixels = small_vit(0), torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.5])
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    theirs.load_state_dict(weights)
    model = MAE(size=32, patch=8, embed_dim=16, depth=2, heads=2, **DECODER)

    initialise(model, run_file(tmp_path / "model.safetensors", weights, mean=mean.tolist(), std=std.tolist()))

    imagenet = (torch.tensor(one).reshape(3, 1, 1) for one in (IMAGENET_MEAN, IMAGENET_STD))
    ours = (pixels - next(imagenet)) / next(imagenet)
    encoded = model.encode(patchify(ours, 8), torch.arange(16).expand(2, -1))
    expected = theirs.forward_features((pixels - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1))
    assert torch.allclose(encoded, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("more", "told", "sentence"),
    [
        ({}, {"num_heads": 4}, "has 2 blocks of width 16, patch 8 and 4 heads, and the model 2 blocks .* and 2 heads"),
        ({"init_values": 1.0}, {}, "is a ViT of 2 blocks of width 16, patch 8, LayerScale; expected a plain one"),
    ],
)
def test_an_encoder_that_the_model_is_not_is_refused(more, told, sentence, tmp_path):
    source = run_file(tmp_path / "model.safetensors", small_vit(0, **more), **told)

    with pytest.raises((ValueError, CheckpointError), match=sentence):
        initialise(MAE(size=32, patch=8, embed_dim=16, depth=2, heads=2, **DECODER), source)


def test_a_size_that_differs_is_refused_with_the_flags_that_fit(tmp_path):
    source = saved(tmp_path / "mae.pth", OFFICIAL)

    with pytest.raises(ValueError, match="add --patch 8 --embed-dim 64 --depth 1 --heads 1, or choose"):
        initialise(MAE(**PLAIN | {"depth": 2}, **DECODER), source)


def test_a_teacher_of_the_masking_is_not_the_encoder_of_its_run(tmp_path):
    """HPM's: a ViT under the name of a teacher, which other people's files mean."""
    weights = {f"encoder.{name}": value for name, value in small_vit(0).items()}
    teacher = {f"masking.teacher.encoder.{name}": value for name, value in small_vit(1).items()}
    model = MAE(size=32, patch=8, embed_dim=16, depth=2, heads=2, **DECODER)

    initialise(model, run_file(tmp_path / "model.safetensors", weights | teacher))

    assert torch.equal(model.encoder.norm.weight, weights["encoder.norm.weight"])


def test_a_run_begins_with_another_on_new_labels_and_goes_on_without_it(make_shards, tmp_path, capsys):
    """The last verb of evolved parts: pretrain, learn-parts, extract --relabel, pretrain --init."""
    data = make_shards()
    info = {"grid": 8, "groups": 6, "size": 32, "classes": list(data.classes), "labels_of": data.fingerprint}
    labels = write_samples(tmp_path / "labels", drawn(40, 32, 8, 6, 3, seed=7), info, samples_per_shard=16)
    sizes = {"patch": 8, "embed_dim": 16, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1}
    sizes |= {"decoder_heads": 2, "epochs": 1, "warmup_epochs": 0, "batch_size": 20}

    def run(name: str, **settings) -> PretrainConfig:
        where = StreamRun(out=tmp_path / name, device="cpu", precision="fp32")
        return PretrainConfig(data=str(data.path), run=where, **sizes | settings)

    pretrain(run("first"))
    settings = {"init": f"run:{tmp_path / 'first'}", "labels": str(labels), "seed": 1}
    with watching(MAE) as watched:
        pretrain(run("straight", **settings))
    pretrain(run("stopped", **settings), stop_after_steps=1)
    first, _ = checkpoint.load_tensors(checkpoint.find(tmp_path / "first"))
    shutil.rmtree(tmp_path / "first")
    capsys.readouterr()
    pretrain(run("stopped", **settings))

    assert all(torch.equal(first[name], weight) for name, weight in watched.initial.items())
    straight, stopped = (
        checkpoint.load_tensors(checkpoint.find(tmp_path / name))[0] for name in ("straight", "stopped")
    )
    assert all(torch.equal(value, stopped[name]) for name, value in straight.items())
    assert "--init" not in capsys.readouterr().err
