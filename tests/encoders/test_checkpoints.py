"""The same ViT, however it was saved: found, told apart from what lies beside it, and renamed without a change."""

import io
import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import forms, metas_registers, small_vit, tiny, under

from encoders.branches import branches
from encoders.load import load_encoder
from encoders.timm_names import in_timm_names
from encoders.weights import read_weights
from training.checkpoint import CheckpointError

PLAIN, OTHER = small_vit(1), small_vit(2)
FORMS = forms(PLAIN, OTHER)
SIDE = 3


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_those_of_the_plain_file_and_where_they_were_is_told(form, tmp_path):
    content, place = FORMS[form]
    torch.save(content, tmp_path / "weights.pth")

    found = read_weights(tmp_path / "weights.pth")

    assert equal(found.tensors, PLAIN)
    assert found.place == place


wrappers = st.lists(
    st.sampled_from(
        ["module", "_orig_mod", "_fsdp_wrapped_module", "model", "net", "backbone", "encoder", "vit.trunk"]
    ),
    max_size=4,
)
keys = st.lists(st.sampled_from(["state_dict", "model", "net", "weights", "checkpoint"]), max_size=3)


@given(prefixes=wrappers, nested=keys, better=st.sampled_from(["teacher", "ema", "model_ema", "momentum_encoder"]))
def test_prefixes_and_keys_may_stand_in_any_number_and_order(prefixes, nested, better):
    prefix = "".join(f"{one}." for one in prefixes)
    content = {**under(f"{prefix}{better}.", PLAIN), **under(f"{prefix}student.", OTHER)}
    for key in nested:
        content = {"epoch": 3, key: content}

    first, second = branches(content)

    kept = [*reversed(nested), *(one for one in prefixes if "_" not in one and one != "module"), better]
    assert first.name == ".".join(kept)
    assert equal(in_timm_names(first.tensors), PLAIN)
    assert equal(in_timm_names(second.tensors), OTHER)


@given(order=st.permutations(["model_ema", "teacher", "momentum_encoder", "model", "student"]))
def test_an_average_is_better_than_a_teacher_and_a_student_is_the_last_resort(order):
    content = {name: dict(PLAIN) for name in order}

    assert [branch.name for branch in branches(content)] == [
        "model_ema", "teacher", "momentum_encoder", "model", "student"
    ]  # fmt: skip


@pytest.mark.parametrize("average", ["swa_state_dict", "modelEma", "averaged_model", "model_EMA"])
def test_averages_go_by_many_names(average):
    assert branches({"state_dict": dict(OTHER), average: dict(PLAIN)})[0].name == average


def test_registers_as_meta_keeps_them_become_timms(tmp_path):
    more = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    theirs = metas_registers(small_vit(1, **more))
    torch.save({"model": under("teacher.backbone.", theirs)}, tmp_path / "registers.pth")

    found = read_weights(tmp_path / "registers.pth").tensors

    expected = small_vit(1, **more)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, atol=1e-6, rtol=0) for name, value in expected.items())


def test_a_swiglu_of_dinov2_takes_timms_names():
    theirs = {"blocks.1.mlp.w12.weight": torch.zeros(6, 2), "blocks.1.mlp.w3.bias": torch.zeros(2)}

    assert set(in_timm_names(theirs)) == {"blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.bias"}


def test_two_vits_that_nothing_tells_apart_are_refused_and_both_named(tmp_path):
    torch.save({"first": PLAIN, "second": OTHER}, tmp_path / "two.pth")

    with pytest.raises(CheckpointError, match=r"a ViT under first and another under second, and does not say which"):
        read_weights(tmp_path / "two.pth")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "found none"),
        ({"epoch": 3}, "found none"),
        ([torch.zeros(1)], "found none"),
        ({"state_dict": {"conv1.weight": torch.zeros(2, 3, 7, 7), "bn1.bias": torch.zeros(2)}},
         r"found 2 tensors \(state_dict\.conv1\.weight, state_dict\.bn1\.bias\)"),
    ],
    ids=["nothing", "no tensor", "a list", "a ResNet"],
)  # fmt: skip
def test_what_holds_no_vit_is_refused_by_what_it_holds(content, found, tmp_path):
    torch.save(content, tmp_path / "other.pth")

    with pytest.raises(CheckpointError, match=rf"other\.pth holds no ViT: expected .*, {found}; check the file$"):
        read_weights(tmp_path / "other.pth")


def test_a_dict_that_holds_itself_is_read():
    content = {"model": dict(PLAIN)}
    content["self"] = content

    assert [branch.name for branch in branches(content)] == ["model"]


@pytest.mark.parametrize(
    ("name", "saved", "sentence"),
    [
        ("vit_tiny_patch16_224", tiny("vit_small_patch16_224", depth=3),
         "found 3 blocks of width 384, patch 16; expected 12 blocks of width 192, patch 16"),
        ("vit_tiny_patch16_224", {"model": under("teacher.backbone.", tiny(patch_size=14, img_size=56))},
         r"holds, under model\.teacher\.backbone, a ViT .* found 12 blocks of width 192, patch 14; expected"),
        ("vit_small_patch14_dinov2", tiny("vit_small_patch14_reg4_dinov2", img_size=56),
         "found 12 blocks of width 384, patch 14, 4 registers, LayerScale; expected .* patch 14, LayerScale;"),
        ("vit_tiny_patch16_224", tiny("deit_tiny_distilled_patch16_224"),
         "found .*, patch 16, a distillation token; expected"),
        ("vit_tiny_patch16_224", tiny("beit_base_patch16_224", depth=1, embed_dim=192),
         "found 1 blocks of width 192, patch 16, LayerScale, relative positions as in BEiT, no learned positions;"),
        ("vit_tiny_patch16_224", {"patch_embed.proj.0.weight": torch.zeros(2, 3, 3, 3)},
         "a ViT with a stem of convolutions before its blocks"),
    ],
    ids=["wider", "other patches", "registers", "distilled", "BEiT", "convolutions"],
)  # fmt: skip
def test_a_vit_of_another_shape_is_refused_by_what_was_found(name, saved, sentence, tmp_path):
    torch.save(saved, tmp_path / "other.pth")

    with pytest.raises(CheckpointError, match=sentence):
        load_encoder(f"timm:{name}={tmp_path / 'other.pth'}")


def test_of_a_teacher_and_a_student_of_other_shapes_the_one_that_fits_is_taken(tmp_path):
    weights = tiny()
    torch.save({"teacher": small_vit(1), "student": weights}, tmp_path / "distilled.pth")

    encoder = load_encoder(f"timm:vit_tiny_patch16_224={tmp_path / 'distilled.pth'}")

    assert torch.equal(encoder.model.cls_token, weights["cls_token"])


def test_positions_of_an_oblong_are_refused_with_their_number(tmp_path):
    torch.save(tiny() | {"pos_embed": torch.zeros(1, 141, 192)}, tmp_path / "oblong.pth")

    with pytest.raises(CheckpointError, match=r"oblong\.pth has positions of 140 patches, which form no square grid"):
        load_encoder(f"timm:vit_tiny_patch16_224={tmp_path / 'oblong.pth'}")


@torch.no_grad()
def tokens_of_timm(name: str, file: Path, pixels: torch.Tensor, **more) -> torch.Tensor:
    """The slow twin: timm's own loading of the file, and its forward."""
    overlay = {"file": str(file), "custom_load": False}
    model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **more)
    return model.eval().forward_features(pixels)


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("vit_small_patch14_reg4_dinov2", lambda w: metas_registers(w)),
        ("vit_tiny_patch16_224",
         lambda w: {"state_dict": tiny(seed=1, img_size=48), "state_dict_ema": under("module.", w)}),
        ("vit_tiny_patch16_224", lambda w: {"model": under("_orig_mod.", w)}),
        ("deit_tiny_distilled_patch16_224", lambda w: {"model": w | {"head_dist.bias": torch.zeros(1000)}}),
        ("deit3_small_patch16_224",
         lambda w: {"model": {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value for name, value in w.items()}}),
    ],
    ids=["DINOv2 with registers", "EMA", "compiled", "DeiT, distilled", "DeiT III"],
)  # fmt: skip
def test_tokens_are_those_of_timms_own_loading(name, saved, tmp_path):
    weights = tiny(name, img_size=SIDE * 14 if "patch14" in name else SIDE * 16)
    for key, value in weights.items():
        if key.endswith(("bias", "gamma", "token")):
            value.normal_(std=0.3, generator=torch.Generator().manual_seed(len(key)))
    torch.save(saved(weights), tmp_path / "weights.pth")
    encoder = load_encoder(f"timm:{name}={tmp_path / 'weights.pth'}", grid=SIDE, precision="fp32")
    images = torch.randint(0, 256, (1, encoder.size, encoder.size, 3), dtype=torch.uint8)

    ours = encoder(images)

    theirs = tokens_of_timm(name, tmp_path / "weights.pth", encoder.prepared(images), img_size=encoder.size)
    prefix = encoder.model.num_prefix_tokens
    assert torch.allclose(ours.class_token, theirs[:, 0], atol=2e-5, rtol=0)
    assert torch.allclose(ours.patch_tokens, theirs[:, prefix:], atol=2e-5, rtol=0)


def test_a_small_vit_of_moco_v3_has_twelve_heads_and_any_other_those_of_its_name(tmp_path, capsys):
    """Its vits.py gives vit_small heads of 32; the shapes of the weights are the same as with heads of 64."""
    weights = under("module.momentum_encoder.", tiny("vit_small_patch16_224"))
    torch.save({"arch": "vit_small", "state_dict": weights}, tmp_path / "moco.pth")
    torch.save({"arch": "vit_mine", "state_dict": weights}, tmp_path / "mine.pth")

    encoder = load_encoder(f"timm:vit_small_patch16_224={tmp_path / 'moco.pth'}", grid=2)

    assert encoder.heads == 12
    assert "with 12 heads as there" in capsys.readouterr().err
    assert read_weights(tmp_path / "mine.pth").heads is None


def test_what_was_taken_is_one_line_in_the_log(tmp_path, capsys):
    torch.save({"state_dict": tiny(seed=1), "state_dict_ema": tiny()}, tmp_path / "timm.pth")

    load_encoder(f"timm:vit_tiny_patch16_224.augreg_in21k={tmp_path / 'timm.pth'}", grid=2)

    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "timm.pth: weights under state_dict_ema, not those under state_dict; mean and deviation: "
        "timm's vit_tiny_patch16_224.augreg_in21k"
    )


class Loud:
    """Tells when a pickle builds it."""

    built = False

    def __reduce__(self):
        return _build, ()


def _build():
    Loud.built = True


def test_no_code_of_a_file_runs_and_the_refusal_names_it(tmp_path):
    torch.save({"model": PLAIN, "hook": Loud()}, tmp_path / "loud.pth")

    with pytest.raises(CheckpointError, match=r"this one holds \S*_build, which only code can rebuild"):
        read_weights(tmp_path / "loud.pth")
    assert not Loud.built


@pytest.mark.parametrize("value", [random.Random(0), torch.nn.Linear(1, 1), io.BytesIO(b"x"), re.compile("x")])
def test_other_objects_than_numbers_paths_and_settings_are_refused(value, tmp_path):
    torch.save({"model": PLAIN, "other": value}, tmp_path / "object.pth")

    with pytest.raises(CheckpointError, match=r"object\.pth is no weights file"):
        read_weights(tmp_path / "object.pth")


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_numbers_that_another_numpy_wrote_are_read(module, tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": PLAIN, "loss": np.float64(2.5)}, buffer, _use_new_zipfile_serialization=False)
    ours = b"cnumpy._core.multiarray\n"  # names of modules stand as lines in protocol 2
    assert ours in buffer.getvalue()
    (tmp_path / "numpy.pth").write_bytes(buffer.getvalue().replace(ours, f"c{module}.multiarray\n".encode()))

    assert equal(read_weights(tmp_path / "numpy.pth").tensors, PLAIN)
