"""Other people's names and forms of a plain ViT, as timm's.

Meta: DINOv2 (arXiv:2304.07193) in training has its blocks in chunks; with registers (arXiv:2309.16588) its positions
count the class token, which timm adds to that token; a fine-tuned MAE (arXiv:2111.06377) norms the mean of its patches.
Hugging Face and mmpretrain: names alone, and queries, keys and values apart.
"""

import re

import torch
from torch import Tensor

NOT_THE_BACKBONE = re.compile(
    r"(head|head_dist|fc_norm|pooler|classifier|scorer_pred|masked_embed|mask_token|embeddings\.mask_token"
    r"|decoder\w*|pre_logits)(\.|$)"
)
"""Heads, decoders and mask tokens: not read for tokens."""
TRANSLATIONS = (
    # Hugging Face: ViT, ViT-MAE, DINOv2
    (r"^embeddings\.(cls_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+\.)attention\.attention\.", r"\1attn."),
    (r"^(blocks\.\d+\.)attention\.output\.dense\.", r"\1attn.proj."),
    (r"^(blocks\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
    (r"^(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
    (r"^(blocks\.\d+\.)layernorm_before\.", r"\1norm1."),
    (r"^(blocks\.\d+\.)layernorm_after\.", r"\1norm2."),
    (r"^(blocks\.\d+\.)layer_scale([12])\.lambda1$", r"\1ls\2.gamma"),
    # mmpretrain
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+\.)ln([12])\.", r"\1norm\2."),
    (r"^(blocks\.\d+\.)ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
    (r"^(blocks\.\d+\.)ffn\.layers\.1\.", r"\1mlp.fc2."),
    (r"^(blocks\.\d+\.)(?:attn|ffn)\.gamma([12])\.weight$", r"\1ls\2.gamma"),
    # DINOv2: chunks of blocks, whose second number counts through; SwiGLU in ViT-g, there and in Hugging Face
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+\.mlp\.)(?:w12|weights_in)\.", r"\1fc1."),
    (r"^(blocks\.\d+\.mlp\.)(?:w3|weights_out)\.", r"\1fc2."),
)


def in_timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone in `tensors` as timm keeps it, in fp32, without heads, decoder and mask token."""
    ours = {_translated(name): value.detach().float() for name, value in tensors.items()}
    if not any(name.startswith("norm.") for name in ours):  # a fine-tuned MAE has this one instead
        ours = {re.sub(r"^fc_norm\.", "norm.", name): value for name, value in ours.items()}
    ours = {name: value for name, value in ours.items() if not NOT_THE_BACKBONE.match(name)}
    return _registers(_joined(ours))


def _translated(name: str) -> str:
    for theirs, ours in TRANSLATIONS:
        name = re.sub(theirs, ours, name)
    return name


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of Hugging Face in one matrix a block."""
    found = {re.sub(r"\.query\.", ".qkv.", name): name for name in weights if ".attn.query." in name}
    parts = {
        joined: [query.replace(".query.", f".{one}.") for one in ("query", "key", "value")]
        for joined, query in found.items()
    }
    parts = {joined: names for joined, names in parts.items() if all(name in weights for name in names)}
    used = {name for names in parts.values() for name in names}
    rest = {name: value for name, value in weights.items() if name not in used}
    return rest | {joined: torch.cat([weights[name] for name in names]) for joined, names in parts.items()}


def _registers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's registers: the class token takes its own position, for timm has positions of patches alone beside them."""
    if "register_tokens" not in weights or not {"cls_token", "pos_embed"} <= weights.keys():
        return weights
    positions = weights["pos_embed"]
    rest = {name: value for name, value in weights.items() if name != "register_tokens"}
    return rest | {
        "reg_token": weights["register_tokens"],
        "cls_token": weights["cls_token"] + positions[:, :1],
        "pos_embed": positions[:, 1:],
    }
