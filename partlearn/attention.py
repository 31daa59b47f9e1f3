"""Eq. 1 and 2 of SemMAE: a class token becomes part queries, and queries become maps over the patches."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Softmax = Literal["parts", "positions"]
Gate = Literal["double", "sigmoid"]
Projections = Literal["part", "shared"]
Temperature = Literal["trained", "none"]


class Prototypes(nn.Module):
    """Part queries that are the same in every image, and no class token: s_i(p) = scale · e_i · F(p)."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.prototypes = nn.Parameter(torch.zeros(parts, width))

    def start_at_prototypes(
        self, centres: Float[Tensor, "parts width"], scale: float, generator: torch.Generator
    ) -> None:
        """Queries that are `centres`; nothing is drawn."""
        self.prototypes.data.copy_(centres)
        self.log_scale.data.fill_(scale).log_()

    @property
    def scale(self) -> Tensor:
        """The factor of the dot product."""
        return self.log_scale.exp()

    def logits(
        self, class_token: Float[Tensor, "batch dim"], tokens: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch parts patches"]:
        """s of Eq. 2, in fp32 whatever the autocast."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.scale * (self.prototypes @ tokens.transpose(1, 2))


class PartAttention(nn.Module):
    """N part maps from an image's tokens (SemMAE, arXiv:2206.10207, Eq. 1 and 2):

        F_p^i = F_c · sigmoid(W_c2^i tanh(W_c1^i F_c))                   Eq. 1, as printed
        s_i(p) = (W_q F_p^i) · (W_k F(p))
        M = softmax(s) over positions or over parts                      Eq. 2

    Departures, each a setting whose other value is the printed one, argued and measured in METHOD.md:

        gate double          2 sigmoid(W_c2^i tanh(W_c1^i F_c + b) + b), W_c2 = 0 at the start, so that F_p = F_c there
        projections part     W_q^i, b_q^i, W_k^i, b_k^i: one shared pair cannot start as separate heads
        temperature trained  scale · s, the scale trained

    e_i · F(p), a prototype per part that is added to s, carries the k-means start and stays 0 otherwise.
    Keys are never formed: W_kᵀq is applied to the tokens, which is the same number and far fewer FLOPs.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        parts: int,
        head_dim: int,
        *,
        gate: Gate = "double",
        projections: Projections = "part",
        temperature: Temperature = "trained",
    ):
        """`dim` of the class token, `width` of the tokens that are read."""
        super().__init__()
        hidden, pairs = max(1, dim // 4), parts if projections == "part" else 1
        self.gate, self.parts = gate, parts

        def zeros(*shape: int, kept: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(shape)) if kept else None

        self.gate_in = nn.Parameter(torch.empty(parts, hidden, dim))
        self.gate_in_bias = zeros(parts, hidden, kept=gate == "double")
        self.gate_out = nn.Parameter(torch.zeros(parts, dim, hidden))
        self.gate_out_bias = zeros(parts, dim, kept=gate == "double")
        self.query = nn.Parameter(torch.empty(pairs, head_dim, dim))
        self.query_bias = zeros(pairs, head_dim, kept=projections == "part")
        self.key = nn.Parameter(torch.empty(pairs, head_dim, width))
        self.key_bias = zeros(pairs, head_dim, kept=projections == "part")
        self.log_scale = nn.Parameter(torch.tensor(head_dim**-0.5).log()) if temperature == "trained" else None
        self.prototypes = nn.Parameter(torch.zeros(parts, width), requires_grad=False)

    def start_at_random(self, generator: torch.Generator) -> None:
        """Xavier-uniform projections, another draw for every part: equal maps would stay equal (Eq. 6 has no
        gradient there). Where projections are shared, the parts differ by their gates alone. Drawn on the CPU, whose
        generator no other device takes."""
        drawn = [self.gate_in, self.query, self.key]
        for weight in drawn if self.gate == "double" else [*drawn, self.gate_out]:
            for part in weight.data:
                part.copy_(nn.init.xavier_uniform_(torch.empty(part.shape), generator=generator))

    def start_at_heads(self, attn: Any, generator: torch.Generator) -> None:
        """Projections of an encoder block's attention heads: maps then equal its class attention, renormalised
        over patches (with gate double). More parts than heads repeat them with noise of 0.02 deviations."""
        assert self.query_bias is not None  # LearnConfig refuses heads for a shared pair
        assert self.key_bias is not None
        self.start_at_random(generator)
        parts, head_dim, dim = self.query.shape
        heads = dim // head_dim
        weight = attn.qkv.weight.detach().reshape(3, heads, head_dim, dim).cpu()
        bias = attn.qkv.bias.detach().reshape(3, heads, head_dim).cpu()
        for part in range(parts):
            head, noise = part % heads, 0.02 if part >= heads else 0.0
            for row, projection, offset in ((0, self.query, self.query_bias), (1, self.key, self.key_bias)):
                spread = noise * weight[row, head].std() * torch.randn(head_dim, dim, generator=generator)
                projection.data[part] = weight[row, head] + spread
                offset.data[part] = bias[row, head]
        if self.log_scale is None:
            self.query.data.mul_(head_dim**-0.5)
            self.query_bias.data.mul_(head_dim**-0.5)

    def start_at_prototypes(
        self, centres: Float[Tensor, "parts width"], scale: float, generator: torch.Generator
    ) -> None:
        """Queries that are `centres`, the same in every image; the class token's path starts at zero."""
        self.start_at_random(generator)
        self.prototypes.requires_grad_(True).data.copy_(centres)
        self.query.data.zero_()
        if self.log_scale is None:
            self.prototypes.data.mul_(scale)
        else:
            self.log_scale.data.fill_(scale).log_()

    @property
    def scale(self) -> Tensor | float:
        """The factor of the dot product."""
        return 1.0 if self.log_scale is None else self.log_scale.exp()

    def part_tokens(self, class_token: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch parts dim"]:
        """F_p of Eq. 1."""
        inner = torch.einsum("bc,nhc->bnh", class_token, self.gate_in)
        if self.gate_in_bias is not None:
            inner = inner + self.gate_in_bias
        gate = torch.einsum("bnh,nch->bnc", torch.tanh(inner), self.gate_out)
        if self.gate_out_bias is not None:
            gate = gate + self.gate_out_bias
        return class_token[:, None] * torch.sigmoid(gate) * (2 if self.gate == "double" else 1)

    def logits(
        self, class_token: Float[Tensor, "batch dim"], tokens: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch parts patches"]:
        """s of Eq. 2, in fp32 whatever the autocast."""
        with torch.autocast(class_token.device.type, enabled=False):
            query, key = (pair.expand(self.parts, -1, -1) for pair in (self.query, self.key))
            queries = torch.einsum("bnc,ndc->bnd", self.part_tokens(class_token), query)
            if self.query_bias is not None:
                queries = queries + self.query_bias
            folded = torch.einsum("bnd,ndc->bnc", queries, key) + self.prototypes
            scores = folded @ tokens.transpose(1, 2)
            if self.key_bias is not None:
                scores = scores + (queries * self.key_bias).sum(-1, keepdim=True)
            return self.scale * scores


def balanced(
    logits: Float[Tensor, "batch parts patches"], softmax: Softmax, inside: Bool[Tensor, "batch patches"]
) -> Float[Tensor, "batch parts patches"]:
    """Scores whose argmax over parts is the argmax of M: over positions, s_i - log of its sum over the inside cells,
    which makes every part carry the same mass; over parts, s itself."""
    if softmax == "parts":
        return logits
    return logits - logits.masked_fill(~inside[:, None], -torch.inf).logsumexp(dim=2, keepdim=True)


def part_maps(
    logits: Float[Tensor, "batch parts patches"], softmax: Softmax, inside: Bool[Tensor, "batch patches"]
) -> Float[Tensor, "batch parts patches"]:
    """M of Eq. 2 on the cells `inside`, 0 elsewhere. Over positions, maps are scaled to mean 1 inside: Eq. 3 (without
    an epsilon) and Eq. 6 do not see their scale, and their entries would otherwise be under AdaIN's epsilon."""
    if softmax == "parts":
        return logits.softmax(dim=1) * inside[:, None]
    return balanced(logits, softmax, inside).exp() * inside[:, None] * inside.sum(dim=1)[:, None, None]
