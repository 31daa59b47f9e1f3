"""Every form in which people hand out ViT weights loads strictly, and anything else fails in one sentence."""

import argparse

import pytest
import timm
import torch

from encoders.load import load_encoder
from encoders.weights import read_weights, resize_positions
from training.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def vit_small() -> dict[str, torch.Tensor]:
    """The keys and shapes of an official iBOT ViT-S/16, drawn at random."""
    return timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0).state_dict()


def images(side: int, count: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)


def official_forms(weights):
    """What main_ibot.py saves, and what its authors hand out (arXiv:2111.07832); MAE's file; a bare state dict.

    A student is DDP around its crops' wrapper and knows a mask embedding; the wrong network's weights are off by one.
    """
    heads = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    teacher = {f"backbone.{name}": value for name, value in (weights | heads).items()}
    student = {f"module.{name}": value for name, value in teacher.items()}
    student["module.backbone.masked_embed"] = torch.zeros(1, 384)
    args = argparse.Namespace(
        arch="vit_small", patch_size=16, lr=5e-4, global_crops_scale=(0.14, 1.0), pred_ratio=[0.0, 0.3],
        use_fp16=True, load_from=None,
    )  # fmt: skip
    rest = {
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 5e-4}]},
        "epoch": 3,
        "args": args,
        "ibot_loss": {"center": torch.zeros(1, 2)},
        "fp16_scaler": None,
    }
    return {
        "flat": dict(weights),
        "teacher handed out": {"state_dict": weights | heads},
        "student handed out": {"state_dict": student},
        "wrapped teacher": {"teacher": teacher},
        "teacher under DDP": {"teacher": {f"module.{name}": value for name, value in teacher.items()}},
        "wrapped student": {"student": student},
        "whole training": {"student": {name: value + 1 for name, value in student.items()}, "teacher": teacher} | rest,
        "whole training, student alone": {"student": student} | rest,
        "mae": {"model": weights | {"decoder_pos_embed": torch.zeros(1), "mask_token": torch.zeros(1)}},
    }


FORMS = list(official_forms({}))


@pytest.mark.parametrize("form", FORMS)
def test_an_official_ibot_file_loads_strictly_whatever_wraps_it(form, vit_small, tmp_path):
    torch.save(official_forms(vit_small)[form], tmp_path / "ibot.pth")

    encoder = load_encoder(f"ibot:{tmp_path / 'ibot.pth'}", grid=14)

    assert (encoder.dim, encoder.depth, encoder.heads, encoder.patch) == (384, 12, 6, 16)
    assert torch.equal(encoder.model.blocks[3].attn.qkv.weight, vit_small["blocks.3.attn.qkv.weight"])


def test_a_file_that_misses_a_tensor_fails_and_names_it(vit_small, tmp_path):
    torch.save({n: w for n, w in vit_small.items() if n != "blocks.7.norm2.bias"}, tmp_path / "cut.pth")

    with pytest.raises(CheckpointError, match=r"1 missing \(blocks\.7\.norm2\.bias\)"):
        load_encoder(f"dino:{tmp_path / 'cut.pth'}")


def test_a_file_of_another_architecture_fails(vit_small, tmp_path):
    torch.save(dict(vit_small), tmp_path / "small.pth")

    with pytest.raises(CheckpointError, match="of another shape"):
        load_encoder(f"timm:vit_tiny_patch16_224={tmp_path / 'small.pth'}")


def test_an_official_file_with_a_tensor_of_another_width_fails_and_names_it(vit_small, tmp_path):
    wrong = vit_small | {"blocks.2.mlp.fc1.bias": torch.zeros(7)}
    torch.save({"teacher": wrong}, tmp_path / "wrong.pth")

    with pytest.raises(CheckpointError, match=r"1 of another shape \(blocks\.2\.mlp\.fc1\.bias\)"):
        load_encoder(f"ibot:{tmp_path / 'wrong.pth'}")


def test_an_official_file_that_heads_of_64_do_not_divide_fails(tmp_path):
    weights = timm.create_model("vit_tiny_patch16_224", embed_dim=96, depth=1, num_classes=0).state_dict()
    torch.save(weights, tmp_path / "narrow.pth")

    with pytest.raises(CheckpointError, match="is 96 wide"):
        load_encoder(f"ibot:{tmp_path / 'narrow.pth'}")


def test_a_file_without_a_class_token_is_no_official_one(vit_small, tmp_path):
    torch.save({n: w for n, w in vit_small.items() if n != "cls_token"}, tmp_path / "pooled.pth")

    with pytest.raises(CheckpointError, match="cls_token is not in it"):
        load_encoder(f"dino:{tmp_path / 'pooled.pth'}")


def test_a_prefix_is_stripped_only_where_it_leads(tmp_path):
    names = ("module.backbone.patch_embed.proj.weight", "module.backbone.blocks.backbone.y", "blocks.backbone.z")
    torch.save({name: torch.zeros(1, 3, 1, 1) for name in names}, tmp_path / "odd.pth")

    weights = read_weights(tmp_path / "odd.pth")

    assert set(weights.tensors) == {"patch_embed.proj.weight", "blocks.backbone.y"}


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"teacher": Evil()}, tmp_path / "evil.pth")

    with pytest.raises(CheckpointError, match="is no weights file"):
        read_weights(tmp_path / "evil.pth")


@pytest.mark.parametrize("content", [b"", b"hello, a letter", b"\x80\x02no pickle", b"PK\x03\x04 no zip"])
def test_what_is_no_weights_file_is_a_sentence_of_our_own(content, tmp_path):
    (tmp_path / "letter.pth").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"letter\.pth is no weights file: expected .* state dict alone$"):
        read_weights(tmp_path / "letter.pth")


@pytest.mark.parametrize("kind", ["dino", "ibot"])
@pytest.mark.parametrize("wrapper", [None, "model"])
def test_a_classifier_is_no_official_file(kind, wrapper, vit_small, tmp_path):
    weights = vit_small | {"head.weight": torch.zeros(10, 384), "head.bias": torch.zeros(10)}
    torch.save({wrapper: weights} if wrapper else weights, tmp_path / "classifier.pth")

    with pytest.raises(CheckpointError, match=r"is no official DINO or iBOT file; .* pass it as timm:NAME=FILE"):
        load_encoder(f"{kind}:{tmp_path / 'classifier.pth'}")
    assert load_encoder(f"timm:vit_small_patch16_224={tmp_path / 'classifier.pth'}").dim == 384


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("resnet", "^an encoder source must be builtin, timm:NAME"),
        ("random:vit_gigantic_patch3", "timm knows no architecture"),
        ("timm:vit_tinny_patch16_224.augreg", "vit_tinny_patch16_224.augreg'; close: vit_tiny_patch16_224, "),
        ("timm:resnet50", "resnet50 is no plain ViT of timm"),
        ("ibot:/no/such/file.pth", "no weights at"),
        ("run:/no/such/run", "no checkpoint at"),
    ],
)
def test_a_wrong_source_is_one_sentence(source, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        load_encoder(source)


def test_a_size_that_the_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="patches of 16 px, which do not divide 100 px"):
        load_encoder("random:vit_tiny_patch16_224", size=100)


def test_positions_keep_their_prefix_and_stay_put_on_their_own_grid():
    positions = torch.randn(1, 1 + 49, 8)

    assert torch.equal(resize_positions(positions, prefix=1, grid=7), positions)
    resized = resize_positions(positions, prefix=1, grid=14)
    assert resized.shape == (1, 1 + 196, 8)
    assert torch.equal(resized[:, :1], positions[:, :1])


def test_encoder_outputs_are_timms_own():
    encoder = load_encoder("random:vit_tiny_patch16_224", size=64, precision="fp32")
    pixels = images(64, 2)

    tokens = encoder(pixels)

    expected = encoder.model.forward_features(encoder.prepared(pixels))
    assert torch.allclose(tokens.class_token, expected[:, 0], atol=1e-5)
    assert torch.allclose(tokens.patch_tokens, expected[:, 1:], atol=1e-5)


def test_tokens_of_a_block_are_what_that_block_reads():
    encoder = load_encoder("random:vit_tiny_patch16_224", size=64, block=2, precision="fp32")
    seen = []
    encoder.model.blocks[2].attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    tokens = encoder(images(64))

    assert torch.allclose(tokens.block_tokens, seen[0], atol=1e-6)


def test_class_attention_is_the_class_row_of_the_full_attention():
    encoder = load_encoder("random:vit_tiny_patch16_224", size=64, precision="fp32")
    attn, seen = encoder.model.blocks[-1].attn, []
    attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    tokens = encoder(images(64, 2))

    batch, count, _ = seen[0].shape
    q, k, _ = attn.qkv(seen[0]).reshape(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    full = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)
    assert torch.allclose(tokens.class_attention, full[:, :, 0, 1:], atol=1e-5)


def test_with_kept_patches_only_those_are_computed():
    encoder = load_encoder("random:vit_tiny_patch16_224", size=64, precision="fp32")
    pixels, everything = images(64, 2), torch.arange(16).expand(2, -1)

    assert torch.allclose(encoder(pixels, everything).patch_tokens, encoder(pixels).patch_tokens, atol=1e-5)
    assert encoder(pixels, everything[:, :5]).patch_tokens.shape == (2, 5, 192)


def test_positions_halved_are_plain_bicubic_without_antialiasing():
    """Weights -3/32, 19/32, 19/32, -3/32 (cubic convolution, a = -3/4) on the four nearest, edges repeated."""
    cells = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0))
    prefix = torch.full((1, 1, 5), 7.0)
    row = torch.tensor([[-3 + 19, 19, -3, 0], [0, -3, 19, 19 - 3]]) / 32

    resized = resize_positions(torch.cat([prefix, cells.reshape(1, 16, 5)], dim=1), prefix=1, grid=2)

    expected = torch.einsum("ay,bx,yxd->abd", row, row, cells).reshape(1, 4, 5)
    torch.testing.assert_close(resized, torch.cat([prefix, expected], dim=1))
