"""The ViT that the verb `encoder` trains, and its tokens."""

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from encoders.distill.config import EncoderConfig
from encoders.frozen import Encoder
from encoders.weights import load_strictly


def new_student(config: EncoderConfig) -> VisionTransformer:
    """Weights from torch's global generator; takes crops of any size that is a multiple of the patch."""
    return VisionTransformer(
        img_size=config.size,
        patch_size=config.patch,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=0,
        dynamic_img_size=True,
    )


def blocks_of(teacher: Encoder, blocks: tuple[int, ...]) -> VisionTransformer:
    """A plain ViT that begins as some of the teacher's blocks, in the order given, between its embedding and its norm.

    LayerScale (DINOv2's) goes into the weights it scales, which computes the same.

    Raises:
        ValueError: The teacher has no such block, or registers or rotary positions, which a plain ViT has not.
        CheckpointError: The teacher has other weights that a plain ViT has not.
    """
    if not isinstance(teacher.model, VisionTransformer) or teacher.model.num_prefix_tokens != 1:
        raise ValueError(
            "--teacher-blocks needs a teacher of learned positions and no registers; "
            "choose another, or leave the blocks out and the student is drawn at random"
        )
    if not all(0 <= block < teacher.depth for block in blocks):
        raise ValueError(f"--teacher-blocks must lie between 0 and {teacher.depth - 1}, got {blocks}")
    student = VisionTransformer(
        img_size=teacher.size,
        patch_size=teacher.patch,
        embed_dim=teacher.dim,
        depth=len(blocks),
        num_heads=teacher.heads,
        num_classes=0,
        dynamic_img_size=True,
    )
    weights = {name: weight.clone() for name, weight in teacher.model.state_dict().items()}
    ours = {name: weight for name, weight in weights.items() if not name.startswith("blocks.")}
    for place, block in enumerate(blocks):
        inside = f"blocks.{block}."
        theirs = {name.removeprefix(inside): weight for name, weight in weights.items() if name.startswith(inside)}
        ours |= {f"blocks.{place}.{name}": weight for name, weight in without_layer_scale(theirs).items()}
    load_strictly(student, ours, f"blocks {blocks} of the teacher")
    return student


def without_layer_scale(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a block whose branches end in γ · (W x + b), as γW and γb."""
    scaled = dict(block)
    for gamma, last in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        if gamma in scaled:
            scale = scaled.pop(gamma)
            scaled[f"{last}.weight"] = scale[:, None] * scaled[f"{last}.weight"]
            scaled[f"{last}.bias"] = scale * scaled[f"{last}.bias"]
    return scaled


def vit_description(model: VisionTransformer, size: int) -> dict[str, Any]:
    """The numbers that build this ViT again, for images of `size` pixels."""
    first: Any = model.blocks[0]
    return {
        "img_size": size,
        "patch_size": int(model.patch_embed.patch_size[0]),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": first.attn.num_heads,
    }
