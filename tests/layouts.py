"""One plain ViT as other people's training and tools save it: their key names, written out."""

import argparse
import pathlib
import re
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

Weights = dict[str, Tensor]


def small_vit(seed: int, **more: Any) -> Weights:
    """Two blocks of width 16, every tensor of them at random."""
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0, **more)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def forms(w: Weights, other: Weights) -> dict[str, tuple[Any, str]]:
    """What was saved, and where in it the weights `w` are; `other` are what must not be taken."""
    head = {"head.weight": torch.zeros(10, 16), "head.bias": torch.zeros(10)}
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        "decoder_embed.weight": torch.zeros(8, 16),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
    }
    projector = {"head.0.weight": torch.zeros(4, 16), "head.1.running_mean": torch.zeros(4)}
    settings = argparse.Namespace(lr=np.float64(1e-3), out=pathlib.PosixPath("/d"), seed=np.int64(3))
    fine_tuned = {re.sub(r"^norm\.", "fc_norm.", name): value for name, value in w.items()} | head
    chunked = {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): value for name, value in w.items()}
    compiled_blocks = {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1._orig_mod.", name): v for name, v in w.items()}
    return {
        "plain": (w, ""),
        "a head beside": (w | head, ""),
        "DDP": (under("module.", w), ""),
        "torch.compile": (under("_orig_mod.", w), ""),
        "DDP of compiled": (under("module._orig_mod.", w), ""),
        "compiled DDP": (under("_orig_mod.module.", w), ""),
        "compiled block by block": ({"model": compiled_blocks}, "model"),
        "FSDP": (under("_fsdp_wrapped_module.", w), ""),
        "averaged by torch": ({"n_averaged": torch.tensor(7), **under("module.", w)}, ""),
        "Lightning, model": ({"state_dict": under("model.", w | head), "epoch": 3}, "state_dict.model"),
        "Lightning, net": ({"state_dict": under("net.", w), "hyper_parameters": {"lr": 1.0}}, "state_dict.net"),
        "Lightning, compiled": ({"state_dict": under("model._orig_mod.backbone.", w)}, "state_dict.model.backbone"),
        "Lightning with an average": (
            {"state_dict": {**under("model.", other), **under("ema_model.module.", w)}}, "state_dict.ema_model"),
        "timm with EMA": ({"arch": "x", "state_dict": other, "state_dict_ema": under("module.", w)}, "state_dict_ema"),
        "DeiT with EMA": ({"model": other | head, "model_ema": w | head, "args": settings}, "model_ema"),
        "EMA first": ({"ema": w, "model": other}, "ema"),
        "ema-pytorch": ({"ema": {**under("online_model.", other), **under("ema_model.", w)}}, "ema.ema_model"),
        "an EMA of a teacher": (
            {"model": {**under("teacher.", other), **under("student.", other)},
             "model_ema": {**under("teacher.", w), **under("student.", other)}}, "model_ema.teacher"),
        "DINO": ({"student": under("module.backbone.", other), "teacher": under("backbone.", w)}, "teacher.backbone"),
        "DINOv2 in training": (
            {"model": {**under("student.backbone.", other), **under("teacher.backbone.", chunked),
                       "teacher.dino_head.last_layer.weight_v": torch.zeros(3, 3)}, "iteration": 1},
            "model.teacher.backbone"),
        "DINOv2, to be evaluated": (
            {"teacher": {**under("backbone.", w), "dino_head.mlp.0.weight": torch.zeros(3, 3)}}, "teacher.backbone"),
        "MoCo v3": (
            {"arch": "vit_base", "state_dict": {
                **under("module.base_encoder.", other | projector), **under("module.momentum_encoder.", w | projector),
                "module.predictor.0.weight": torch.zeros(2, 2)}}, "state_dict.momentum_encoder"),
        "MoCo v3, to be evaluated": ({"state_dict": under("module.base_encoder.", w)}, "state_dict.base_encoder"),
        "I-JEPA": (
            {"encoder": under("module.", other), "target_encoder": under("module.", w), "predictor": {}},
            "target_encoder"),
        "MAE": ({"model": w}, "model"),
        "MAE with its decoder": ({"model": w | decoder}, "model"),
        "MAE, fine-tuned": ({"model": fine_tuned, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "model"),
        "numbers of numpy, paths, settings": (
            {"model": w, "args": settings, "loss": np.float32(2), "rng": np.zeros(3), "best": np.bool_(True)}, "model"),
        "copies of one": ({"model": w, "best": dict(w)}, "model"),
        "mmpretrain": ({"state_dict": under("backbone.", mmpretrain(w)), "meta": {"epoch": 1}}, "state_dict.backbone"),
        "Hugging Face": (under("vit.", hugging_face(w)) | {"classifier.weight": torch.zeros(2, 16)}, "vit"),
        "Hugging Face, without its task": (hugging_face(w) | {"pooler.dense.weight": torch.zeros(2, 16)}, ""),
    }  # fmt: skip


def mmpretrain(weights: Weights) -> Weights:
    """vision_transformer.py of mmpretrain 1.x."""
    names = {"patch_embed.proj.": "patch_embed.projection.", "blocks.": "layers.", "norm1": "ln1", "norm2": "ln2",
             "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}  # fmt: skip
    theirs = {}
    for name, value in weights.items():
        for ours, other in names.items():
            name = name.replace(ours, other)
        theirs[re.sub(r"^norm\.", "ln1.", name)] = value
    return theirs


def hugging_face(weights: Weights) -> Weights:
    """modeling_vit.py of transformers 4."""
    theirs = {}
    for name, value in weights.items():
        if ".attn.qkv." in name:
            for one, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[name.replace(".attn.qkv.", f".attention.attention.{one}.")] = part.clone()
            continue
        theirs[name] = value
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj.": "embeddings.patch_embeddings.projection.", "norm1": "layernorm_before",
             "norm2": "layernorm_after", "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
             "mlp.fc2": "output.dense", "blocks.": "encoder.layer."}  # fmt: skip
    for ours, other in names.items():
        theirs = {name.replace(ours, other): value for name, value in theirs.items()}
    return {re.sub(r"^norm\.", "layernorm.", name): value for name, value in theirs.items()}


def metas_registers(weights: Weights) -> Weights:
    """timm's reg4 weights as Meta hands them out: a mask token, and positions that count the class token."""
    theirs = {name: value for name, value in weights.items() if name not in ("reg_token", "cls_token", "pos_embed")}
    of_class = torch.randn(1, 1, weights["cls_token"].shape[-1], generator=torch.Generator().manual_seed(5))
    return theirs | {
        "mask_token": torch.zeros(1, weights["cls_token"].shape[-1]),
        "register_tokens": weights["reg_token"],
        "cls_token": weights["cls_token"] - of_class,
        "pos_embed": torch.cat([of_class, weights["pos_embed"]], dim=1),
    }


def tiny(name: str = "vit_tiny_patch16_224", seed: int = 0, **more: Any) -> Weights:
    """timm's architecture of that name, at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(timm.create_model(name, pretrained=False, num_classes=0, **more).state_dict())
