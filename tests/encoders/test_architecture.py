"""Register tokens and rotary positions: what an encoder returns is what timm's own forward computes, to 1e-5."""

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope, LayerNorm
from timm.models.eva import EvaAttention
from torch.nn import functional as F

from encoders.architecture import checked, class_attention
from encoders.load import load_encoder

REGISTERS, DINOV3, DINOV3_BIASED = (
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
)
MIXED = "vit_small_patch16_rope_mixed_224"  # a rotation of its own for every block and head
NAMES = [REGISTERS, DINOV3, DINOV3_BIASED, MIXED]
GRID = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Encoder sources: one file per architecture, drawn at random, where every tensor makes a difference."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("weights")
    for name in NAMES:
        weights = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
        for key, value in weights.items():
            if key.endswith(("bias", "gamma", "gamma_1", "gamma_2", "token")):
                value.normal_(std=0.5, generator=generator)
            if "qkv.weight" in key:
                value.mul_(3)
        torch.save(weights, folder / f"{name}.pth")
    return {name: f"timm:{name}={folder / name}.pth" for name in NAMES}


def squares(encoder, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, encoder.size, encoder.size, 3), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def timms_own(encoder, images, mask=None):
    """Tokens of timm's forward, what norm1 of the chosen block gives there, and the last block's full attention."""
    seen, last = {}, encoder.model.blocks[-1].attn
    last.fused_attn = False
    hooks = [
        encoder.model.blocks[encoder.block].norm1.register_forward_hook(lambda *call: seen.update(block=call[2])),
        last.attn_drop.register_forward_hook(lambda *call: seen.update(attention=call[2])),
    ]
    tokens = encoder.model.forward_features(encoder.prepared(images), attn_mask=mask)
    for hook in hooks:
        hook.remove()
    return tokens, seen["block"], seen["attention"]


def close(ours, theirs) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_class_attention_are_timms_own_without_the_registers(name, files):
    encoder = load_encoder(files[name], grid=GRID, block=7, precision="fp32")
    images, prefix = squares(encoder), encoder.model.num_prefix_tokens

    ours = encoder(images)

    tokens, block, attention = timms_own(encoder, images)
    assert prefix == (1 if name == MIXED else 5)
    assert close(ours.class_token, tokens[:, 0])
    assert close(ours.patch_tokens, tokens[:, prefix:])
    assert close(ours.block_tokens, torch.cat([block[:, :1], block[:, prefix:]], dim=1))
    assert close(ours.class_attention, attention[:, :, 0, prefix:])
    assert ours.class_attention.amax(dim=-1).mean() > 1.5 * ours.class_attention.mean(), "all but uniform tells nothing"


@pytest.mark.parametrize("name", NAMES)
def test_kept_patches_are_encoded_as_if_the_others_could_not_be_read(name, files):
    encoder = load_encoder(files[name], grid=GRID, precision="fp32")
    images, prefix = squares(encoder), encoder.model.num_prefix_tokens
    ids_visible = torch.stack([torch.tensor([7, 2, 11, 0, 14]), torch.tensor([3, 15, 4, 9, 8])])
    readable = torch.zeros(2, 1, 1, prefix + GRID**2, dtype=torch.bool)
    readable[..., :prefix] = True
    readable[:, 0, 0].scatter_(1, prefix + ids_visible, True)

    ours = encoder(images, ids_visible)

    tokens, block, attention = timms_own(encoder, images, readable.expand(-1, -1, readable.shape[-1], -1))
    rows = torch.arange(2)[:, None]
    assert close(ours.class_token, tokens[:, 0])
    assert close(ours.patch_tokens, tokens[rows, prefix + ids_visible])
    assert close(ours.block_tokens[:, 1:], block[rows, prefix + ids_visible])
    assert close(ours.class_attention, attention[:, :, 0].transpose(1, 2)[rows, prefix + ids_visible].transpose(1, 2))


def test_learned_positions_beside_registers_are_resized_and_the_prefix_has_none(files):
    encoder = load_encoder(files[REGISTERS], grid=GRID, precision="fp32")
    stored = torch.load(files[REGISTERS].partition("=")[2], weights_only=True)

    square = stored["pos_embed"].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(GRID, GRID), mode="bicubic").permute(0, 2, 3, 1).reshape(1, GRID**2, 384)
    assert torch.allclose(encoder.model.pos_embed, expected, atol=1e-6)
    assert torch.equal(encoder.model.reg_token, stored["reg_token"])
    assert torch.equal(encoder.model.cls_token, stored["cls_token"])
    assert encoder.description["positions"] == "37x37 to 4x4, bicubic, no antialias"


@pytest.mark.parametrize("grid", [3, 6])
def test_a_rotary_model_takes_any_grid_and_resizes_nothing(grid, files):
    encoder = load_encoder(files[DINOV3], size=16 * grid, precision="fp32")
    theirs = timm.create_model(DINOV3, pretrained=False, num_classes=0).eval()
    theirs.load_state_dict(torch.load(files[DINOV3].partition("=")[2], weights_only=True))

    with torch.no_grad():
        tokens = theirs.forward_features(encoder.prepared(squares(encoder)))

    assert close(encoder(squares(encoder)).patch_tokens, tokens[:, 5:])
    assert encoder.description["positions"] == f"rotary, computed for {grid}x{grid}"


def test_every_block_of_a_random_rotary_model_does_something():
    encoder = load_encoder("random:vit_tiny_patch16_dinov3_qkvb", grid=2)

    assert all((block.gamma_1 == 1).all() and (block.gamma_2 == 1).all() for block in encoder.blocks)


@pytest.mark.parametrize(
    "attn",
    [
        Attention(32, num_heads=4, qkv_bias=False),
        Attention(32, num_heads=4, qkv_bias=True, qk_norm=True, attn_head_dim=16, norm_layer=LayerNorm),
        EvaAttention(32, num_heads=4, qkv_fused=True, qkv_bias=True, scale_norm=False),
        EvaAttention(32, num_heads=4, qkv_fused=True, qkv_bias=False, scale_norm=False, rotate_half=True),
        EvaAttention(32, num_heads=4, qkv_fused=False, qkv_bias=True, scale_norm=False, rotate_half=True),
        EvaAttention(32, num_heads=4, qkv_fused=False, qkv_bias=False, qk_norm=True, norm_layer=LayerNorm),
        AttentionRope(32, num_heads=4, qkv_fused=False, num_prefix_tokens=3, rotate_half=True),
    ],
    ids=lambda attn: type(attn).__name__,
)
@torch.no_grad()
def test_the_class_row_is_that_of_the_full_attention_however_timm_keeps_its_weights(attn):
    for key, weight in attn.named_parameters():
        weight.normal_(std=0.5 if key.endswith("bias") else 0.3)
    full, normed = [], torch.randn(2, 9, 32)
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda *call: full.append(call[2]))
    turn = {} if isinstance(attn, Attention) else {"rope": torch.randn(9 - attn.num_prefix_tokens, 16)}

    attn.eval()(normed, **turn)

    assert close(class_attention(attn, normed, turn.get("rope")), full[0][:, :, 0])


def test_a_vit_without_a_class_token_is_refused():
    with pytest.raises(ValueError, match=r"^vit_little_patch16_reg4_gap_256 has no class token"):
        load_encoder("random:vit_little_patch16_reg4_gap_256", grid=2)
    pooled = timm.create_model("vit_tiny_patch16_224", depth=1, class_token=False, global_pool="avg", num_classes=0)
    with pytest.raises(ValueError, match="pooled has no class token"):
        checked(pooled, "pooled")
    rotary = timm.create_model("vit_tiny_patch16_dinov3_qkvb", depth=1, class_token=False, num_classes=0)
    with pytest.raises(ValueError, match="rotary has no class token"):
        checked(rotary, "rotary")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_r_s16_p8_224", {}),
        ("vit_small_patch16_18x2_224", {"depth": 1}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1)}),
        ("vit_tiny_patch16_224", {"depth": 1, "attn_layer": "diff"}),
        ("vit_tiny_patch16_dinov3_qkvb", {"depth": 1, "use_post_norm": True}),
    ],
    ids=["convolutions first", "parallel blocks", "windows", "differential attention", "post-norm"],
)
def test_a_vit_whose_tokens_mean_something_else_is_refused(name, options):
    model = timm.create_model(name, pretrained=False, num_classes=0, **options)

    with pytest.raises(ValueError, match="is no plain ViT of timm"):
        checked(model, name)


@pytest.mark.parametrize("name", [REGISTERS, MIXED])
def test_class_attention_in_bf16_is_exact_to_fp32_on_what_the_last_block_reads(name, files):
    """An autocast makes bf16 of fp32 factors too: a row then has about a hundred different values."""
    encoder = load_encoder(files[name], grid=16, precision="bf16")
    last, seen = encoder.model.blocks[-1], {}
    last.register_forward_pre_hook(lambda _, inputs, options: seen.update(x=inputs[0], **options), with_kwargs=True)

    attention = encoder(squares(encoder)).class_attention

    prefix, turn = encoder.model.num_prefix_tokens, seen.get("rope")
    twin = class_attention(last.attn.double(), last.norm1.double()(seen["x"].double()), turn)[:, :, prefix:]
    assert torch.allclose(attention.double(), twin.double(), rtol=1e-4, atol=0)
    assert all(len(row.unique()) > 0.95 * 256 for row in attention.flatten(0, 1))
