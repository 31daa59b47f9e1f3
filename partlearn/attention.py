"""Eq. 1 and 2 of SemMAE: a class token becomes part queries, and queries become maps over the patches."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Softmax = Literal["parts", "positions"]


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

    def logits(
        self, class_token: Float[Tensor, "batch dim"], tokens: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch parts patches"]:
        """s of Eq. 2, in fp32 whatever the autocast."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.log_scale.exp() * (self.prototypes @ tokens.transpose(1, 2))


class PartAttention(nn.Module):
    """N part maps from an image's tokens (SemMAE, arXiv:2206.10207, Eq. 1 and 2):

        F_p^i = F_c · gate · sigmoid(W_c2^i tanh(W_c1^i F_c))            Eq. 1
        s_i(p) = scale · [(W_q^i F_p^i + b_q^i) · (W_k^i F(p) + b_k^i) + e_i · F(p)]
        M = softmax(s) over positions or over parts                      Eq. 2

    Departures, each argued in METHOD.md: W_c2 starts at 0 and gate = 2, so that F_p = F_c at the start and the
    heads' initialisation is exact; projections are per part (one shared pair cannot express separate heads);
    e_i, a prototype per part, carries the k-means start and stays 0 otherwise.
    Keys are never formed: W_kᵀq is applied to the tokens, which is the same number and far fewer FLOPs.
    """

    def __init__(self, dim: int, width: int, parts: int, head_dim: int):
        """`dim` of the class token, `width` of the tokens that are read."""
        super().__init__()
        hidden = max(1, dim // 4)
        self.gate_in = nn.Parameter(torch.empty(parts, hidden, dim))
        self.gate_in_bias = nn.Parameter(torch.zeros(parts, hidden))
        self.gate_out = nn.Parameter(torch.zeros(parts, dim, hidden))
        self.gate_out_bias = nn.Parameter(torch.zeros(parts, dim))
        self.query = nn.Parameter(torch.empty(parts, head_dim, dim))
        self.query_bias = nn.Parameter(torch.zeros(parts, head_dim))
        self.key = nn.Parameter(torch.empty(parts, head_dim, width))
        self.key_bias = nn.Parameter(torch.zeros(parts, head_dim))
        self.log_scale = nn.Parameter(torch.tensor(head_dim**-0.5).log())
        self.prototypes = nn.Parameter(torch.zeros(parts, width), requires_grad=False)

    def start_at_random(self, generator: torch.Generator) -> None:
        """Xavier-uniform projections, another draw for every part: equal maps would stay equal (Eq. 6 has no
        gradient there). Drawn on the CPU, whose generator no other device takes."""
        for weight in (self.gate_in, self.query, self.key):
            for part in weight.data:
                part.copy_(nn.init.xavier_uniform_(torch.empty(part.shape), generator=generator))

    def start_at_heads(self, attn: Any, generator: torch.Generator) -> None:
        """Projections of an encoder block's attention heads: maps then equal its class attention, renormalised
        over patches. More parts than heads repeat them with noise of 0.02 deviations."""
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

    def start_at_prototypes(
        self, centres: Float[Tensor, "parts width"], scale: float, generator: torch.Generator
    ) -> None:
        """Queries that are `centres`, the same in every image; the class token's path starts at zero."""
        self.start_at_random(generator)
        self.prototypes.requires_grad_(True).data.copy_(centres)
        self.query.data.zero_()
        self.log_scale.data.fill_(scale).log_()

    def logits(
        self, class_token: Float[Tensor, "batch dim"], tokens: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch parts patches"]:
        """s of Eq. 2, in fp32 whatever the autocast."""
        with torch.autocast(class_token.device.type, enabled=False):
            inner = torch.tanh(torch.einsum("bc,nhc->bnh", class_token, self.gate_in) + self.gate_in_bias)
            gate = 2 * torch.sigmoid(torch.einsum("bnh,nch->bnc", inner, self.gate_out) + self.gate_out_bias)
            part_tokens = class_token[:, None] * gate
            queries = torch.einsum("bnc,ndc->bnd", part_tokens, self.query) + self.query_bias
            folded = torch.einsum("bnd,ndc->bnc", queries, self.key) + self.prototypes
            scores = folded @ tokens.transpose(1, 2) + (queries * self.key_bias).sum(-1, keepdim=True)
            return self.log_scale.exp() * scores


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
    """M of Eq. 2 on the cells `inside`, 0 elsewhere. Over positions, maps are scaled to mean 1 inside: their
    entries would otherwise be under AdaIN's epsilon."""
    if softmax == "parts":
        return logits.softmax(dim=1) * inside[:, None]
    return balanced(logits, softmax, inside).exp() * inside[:, None] * inside.sum(dim=1)[:, None, None]
