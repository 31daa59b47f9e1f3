"""What kind of ViT weights are, read off their names and shapes: what a refusal shows."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """All of a ViT that its weights tell, but the number of heads."""

    depth: int
    dim: int
    patch: int
    traits: tuple[str, ...]
    """What sets it apart from the plain ViT."""

    def __str__(self) -> str:
        return ", ".join((f"{self.depth} blocks of width {self.dim}", f"patch {self.patch}", *self.traits))


def shape_of(weights: dict[str, Tensor]) -> Shape | None:
    """The ViT that weights in timm's names (of a model on any device) are of; None where they are of no plain one."""
    embedding = weights.get("patch_embed.proj.weight")
    if embedding is None or embedding.ndim != 4:
        return None
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return Shape(depth, embedding.shape[0], embedding.shape[-1], tuple(_traits(weights, embedding.shape[0])))


def _traits(weights: dict[str, Tensor], dim: int) -> list[str]:
    traits = []
    if "cls_token" not in weights:
        traits.append("no class token")
    if "dist_token" in weights:
        traits.append("a distillation token")
    if "reg_token" in weights:
        traits.append(f"{weights['reg_token'].shape[1]} registers")
    if any(name.endswith((".ls1.gamma", ".gamma_1")) for name in weights):
        traits.append("LayerScale")
    if any("relative_position" in name or "rel_pos" in name for name in weights):
        traits.append("relative positions as in BEiT")
    if "pos_embed" not in weights:
        traits.append("no learned positions")
    hidden = weights.get("blocks.0.mlp.fc1.weight")
    if hidden is not None and len(hidden) != 4 * dim:
        traits.append(f"MLPs {len(hidden)} wide")
    return traits
