"""Equations 1 to 6, against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from encoders.load import load_encoder
from encoders.whitening import centred_tokens
from partlearn.attention import PartAttention, balanced, part_maps
from partlearn.decoder import ImageDecoder, blur
from partlearn.foreground import border_cells, border_distance, foreground_rank
from partlearn.kmeans import spherical_kmeans
from partlearn.losses import balance_loss, diversity_loss, feature_loss


def everywhere(batch: int, patches: int) -> torch.Tensor:
    return torch.ones(batch, patches, dtype=torch.bool)


def random_attention(parts: int = 3, dim: int = 8) -> PartAttention:
    attention = PartAttention(dim, dim, parts, 4)
    attention.start_at_random(torch.Generator().manual_seed(0))
    return attention


def test_maps_that_start_at_the_heads_are_the_encoders_class_attention():
    encoder = load_encoder("random:vit_small_patch16_224", size=64, precision="fp32")
    with torch.no_grad():  # queries and keys with biases that matter
        encoder.model.blocks[-1].attn.qkv.bias.normal_()
    tokens = encoder(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    attention = PartAttention(encoder.dim, encoder.dim, encoder.heads, encoder.dim // encoder.heads)
    attention.start_at_heads(encoder.model.blocks[-1].attn, torch.Generator().manual_seed(0))

    logits = attention.logits(tokens.block_tokens[:, 0], tokens.block_tokens[:, 1:])
    maps = part_maps(logits, "positions", everywhere(2, 16)) / 16

    expected = tokens.class_attention / tokens.class_attention.sum(-1, keepdim=True)
    assert torch.allclose(maps, expected, atol=1e-5)


class NoForeignGenerator(TorchFunctionMode):
    """Refuses what CUDA refuses: a generator of another device than the tensor that is filled."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        generator = (kwargs or {}).get("generator")
        if generator is not None and args and isinstance(args[0], torch.Tensor):
            assert args[0].device.type == generator.device.type
        return func(*args, **(kwargs or {}))


def test_every_start_draws_on_the_cpu_wherever_the_learner_is():
    """Else `learn-parts` ends with an error on every GPU as soon as it takes a step."""
    encoder = load_encoder("random:vit_tiny_patch16_224", size=32, precision="fp32")
    attention = PartAttention(encoder.dim, encoder.dim, 4, encoder.dim // encoder.heads).to("meta")
    generator = torch.Generator().manual_seed(0)

    with NoForeignGenerator():
        attention.start_at_random(generator)
        attention.start_at_heads(encoder.model.blocks[-1].attn, generator)
        attention.start_at_prototypes(torch.zeros(4, encoder.dim), 1.0, generator)


def test_more_parts_than_heads_start_different():
    encoder = load_encoder("random:vit_tiny_patch16_224", size=64)
    attention = PartAttention(192, 192, 6, 64)

    attention.start_at_heads(encoder.model.blocks[-1].attn, torch.Generator().manual_seed(0))

    assert torch.equal(attention.query[0], encoder.model.blocks[-1].attn.qkv.weight[:64])
    assert not torch.equal(attention.query[0], attention.query[3])


def test_folded_queries_are_eq_1_and_2_written_out():
    attention = random_attention()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    class_token, tokens = torch.randn(2, 8), torch.randn(2, 5, 8)

    logits = attention.logits(class_token, tokens)

    for b in range(2):
        for i in range(3):
            inner = torch.tanh(attention.gate_in[i] @ class_token[b] + attention.gate_in_bias[i])
            gate = torch.sigmoid(attention.gate_out[i] @ inner + attention.gate_out_bias[i])
            part_token = class_token[b] * 2 * gate
            query = attention.query[i] @ part_token + attention.query_bias[i]
            for p in range(5):
                key = attention.key[i] @ tokens[b, p] + attention.key_bias[i]
                score = attention.log_scale.exp() * (query @ key + attention.prototypes[i] @ tokens[b, p])
                assert logits[b, i, p].item() == pytest.approx(score.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("softmax", ["parts", "positions"])
def test_maps_are_distributions_inside_and_nothing_outside(softmax):
    inside = everywhere(2, 9)
    inside[:, 6:] = False

    maps = part_maps(torch.randn(2, 3, 9), softmax, inside)

    assert (maps[:, :, 6:] == 0).all()
    axis, total = (1, 1.0) if softmax == "parts" else (2, 6.0)
    sums = maps.sum(dim=axis)
    assert torch.allclose(sums[:, :6] if softmax == "parts" else sums, torch.tensor(total))


def test_the_argmax_over_positions_is_that_of_the_maps():
    logits, inside = torch.randn(4, 3, 25), everywhere(4, 25)

    maps = part_maps(logits, "positions", inside)

    assert torch.equal(balanced(logits, "positions", inside).argmax(1), maps.argmax(1))


def test_centred_tokens_do_not_change_when_an_image_shifts_as_a_whole():
    tokens, inside = torch.randn(2, 9, 4), everywhere(2, 9)

    shifted = centred_tokens(tokens + torch.randn(2, 1, 4), inside)

    assert torch.allclose(shifted, centred_tokens(tokens, inside), atol=1e-5)


def test_diversity_is_0_for_disjoint_maps_and_30_of_36_for_equal_ones():
    assert diversity_loss(torch.eye(6)[None]).item() == 0
    assert diversity_loss(torch.ones(2, 6, 9)).item() == pytest.approx(30 / 36)


@given(scale=st.floats(0.1, 10))
def test_diversity_does_not_see_scale(scale):
    maps = torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(1))

    assert diversity_loss(scale * maps).item() == pytest.approx(diversity_loss(maps).item(), rel=1e-4)


def test_balance_is_0_for_equal_use_and_log_n_for_a_single_part():
    alone = torch.zeros(2, 4, 8)
    alone[:, 1] = 1

    assert balance_loss(torch.full((2, 4, 8), 0.25), everywhere(2, 8)).item() == pytest.approx(0, abs=1e-6)
    assert balance_loss(alone, everywhere(2, 8)).item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-3)


def test_the_feature_loss_is_0_where_every_token_is_its_parts_vector():
    vectors = torch.randn(3, 5)
    chosen = torch.tensor([[0, 2, 1, 1]])
    maps = torch.nn.functional.one_hot(chosen, 3).transpose(1, 2).float()

    assert feature_loss(maps, vectors, vectors[chosen], everywhere(1, 4)).item() == pytest.approx(0, abs=1e-6)


def test_the_blur_keeps_constants_and_column_sums():
    shares = torch.rand(2, 3, 12, 12).softmax(dim=1)

    assert torch.allclose(blur(torch.ones(1, 2, 12, 12)), torch.ones(1, 2, 12, 12), atol=1e-6)
    assert torch.allclose(blur(shares).sum(1), torch.ones(2, 12, 12), atol=1e-5)
    assert blur(torch.ones(1, 2, 3, 3)).shape == (1, 2, 3, 3)


@pytest.mark.parametrize(("grid", "size"), [(7, 28), (28, 112), (4, 4)])
def test_the_decoder_rebuilds_at_its_size_and_looks_at_the_class_token(grid, size):
    decoder, maps = ImageDecoder(16, 3, grid=grid, size=size), torch.rand(2, 3, grid, grid)

    first, second = decoder(maps, torch.randn(2, 16)), decoder(maps, torch.randn(2, 16))

    assert first.shape == (2, 3, size, size)
    assert not torch.allclose(first, second)


def test_the_border_ring_and_the_object_inside_it():
    tokens = torch.tensor([1.0, 0.0]).repeat(1, 25, 1)
    tokens[0, 12] = torch.tensor([0.0, 1.0])

    score = border_distance(tokens)

    assert len(border_cells(5)) == 16
    assert foreground_rank(score)[0, 12] == 0
    assert score[0, 12].item() == pytest.approx(1, abs=1e-5)


@given(seed=st.integers(0, 99), levels=st.integers(1, 5))
def test_the_foreground_rank_is_a_permutation_and_ties_go_by_index(seed, levels):
    score = torch.randint(0, levels, (2, 16), generator=torch.Generator().manual_seed(seed)).float()

    rank = foreground_rank(score)

    assert torch.equal(rank.sort(dim=1).values, torch.arange(16).expand(2, -1))
    order = rank.argsort(dim=1)
    sorted_score = score.gather(1, order)
    same = sorted_score[:, 1:] == sorted_score[:, :-1]
    assert (sorted_score[:, 1:] <= sorted_score[:, :-1]).all()
    assert (order[:, 1:] > order[:, :-1])[same].all()


def test_kmeans_finds_separate_clusters():
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(4).repeat_interleave(50, dim=0)
    points = torch.nn.functional.normalize(axes + 0.1 * torch.randn(200, 4, generator=generator), dim=1)

    centres = spherical_kmeans(points, 4, generator=generator)

    assert sorted(centres.argmax(dim=1).tolist()) == [0, 1, 2, 3]
    assert (points @ centres.T).amax(dim=1).min() > 0.8
