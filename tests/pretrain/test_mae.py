"""The autoencoder against timm, against slow twins, and against itself on fewer patches."""

import math
from types import SimpleNamespace

import pytest
import torch
from reference import mae_step

from pretrain.mae import MAE, gather, normalised_per_patch, patchify, unpatchify
from pretrain.position import sincos_positions


@pytest.fixture(scope="module")
def model() -> MAE:
    torch.manual_seed(0)
    return MAE(
        size=32, patch=8, embed_dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2
    ).eval()


def test_positions_are_maes_formula():
    table = sincos_positions(8, 3, 5)[0]

    assert table[0].tolist() == [0] * 8
    for row in range(3):
        for column in range(5):
            for k in range(2):
                frequency = 10_000 ** (-k / 2)
                token = table[1 + 5 * row + column]
                expected = [math.sin(column * frequency), math.cos(column * frequency)]
                assert token[[k, 2 + k]].tolist() == pytest.approx(expected, abs=1e-6)
                expected = [math.sin(row * frequency), math.cos(row * frequency)]
                assert token[[4 + k, 6 + k]].tolist() == pytest.approx(expected, abs=1e-6)


def test_with_nothing_masked_the_encoder_is_timms_own(model):
    images = torch.randn(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, -1)

    encoded = model.encode(patchify(images, 8), everything)

    assert torch.allclose(encoded, model.encoder.forward_features(images), atol=1e-5)


def test_a_patch_is_embedded_wherever_it_stands_in_the_list(model):
    images, ids = torch.randn(1, 3, 32, 32), torch.tensor([[9, 2, 14]])
    patches = patchify(images, 8)

    one = model.encode(patches[:, [9, 2, 14]], ids)
    other = model.encode(patches[:, [14, 9, 2]], torch.tensor([[14, 9, 2]]))

    assert torch.allclose(one[:, [0, 3, 1, 2]], other, atol=1e-5)


def test_patches_outside_both_lists_do_not_matter(model):
    """Keep-quarter: the loss on a quarter is that of any image which agrees there."""
    images, other = torch.randn(2, 2, 3, 32, 32)
    visible, masked = torch.tensor([[0, 5], [3, 4]]), torch.tensor([[10, 11], [1, 15]])
    mixed = patchify(other, 8)
    for ids in (visible, masked):
        index = ids[..., None].expand(-1, -1, mixed.shape[-1])
        mixed.scatter_(1, index, patchify(images, 8).gather(1, index))

    assert torch.allclose(
        model(images, visible, masked), model(unpatchify(mixed, 8, rows=4), visible, masked), atol=1e-6
    )


def test_masked_pixels_do_not_reach_the_prediction(model):
    images, visible, masked = torch.randn(1, 3, 32, 32), torch.tensor([[0, 5, 6]]), torch.tensor([[1, 2, 3]])
    patches = patchify(images, 8)
    changed = patches.clone()
    changed[:, [1, 2, 3]] += 1

    assert torch.equal(model.predict(patches, visible, masked), model.predict(changed, visible, masked))


def test_the_decoder_sees_each_token_at_its_own_place_as_in_mae(model):
    """MAE lays all tokens out on the grid, mask tokens in the gaps, and adds the whole position table."""
    images, ids = torch.randn(2, 3, 32, 32), torch.stack([torch.randperm(16), torch.randperm(16)])
    visible, masked = ids[:, :4], ids[:, 4:]
    patches = patchify(images, 8)

    predicted = model.predict(patches, visible, masked)

    for b in range(2):
        chosen = patches[b : b + 1, visible[b]]
        latent = model.decoder_embed(model.encode(chosen, visible[b : b + 1]))[0]
        grid = model.mask_token[0].repeat(16, 1)
        for place, patch in enumerate(visible[b].tolist()):
            grid[patch] = latent[1 + place]
        x = torch.cat([latent[:1], grid])[None] + model.decoder_positions
        for block in model.decoder_blocks:
            x = block(x)
        whole = model.decoder_pixels(model.decoder_norm(x))[0, 1:]
        assert torch.allclose(predicted[b], whole[masked[b]], atol=1e-5)


def test_a_kept_quarter_is_a_full_grid_with_the_other_patches_barred(model):
    """Attention over the full grid, in which nobody may look at a dropped patch, gives the kept ones the same."""
    images, kept = torch.randn(1, 3, 32, 32), torch.tensor([[1, 6, 7, 12]])
    tokens = torch.cat([torch.tensor([0]), 1 + kept[0]])
    barred = torch.full((1, 1, 17, 17), -torch.inf)
    barred[..., tokens] = 0

    encoded = model.encode(patchify(images, 8)[:, kept[0]], kept)

    x = model.encoder._pos_embed(model.encoder.patch_embed(images))
    for block in model.encoder.blocks:
        x = block(x, attn_mask=barred)
    assert torch.allclose(encoded, model.encoder.norm(x)[:, tokens], atol=1e-5)


def test_the_loss_is_its_definition_a_patch_at_a_time(model):
    images, visible, masked = (
        torch.randn(2, 3, 32, 32),
        torch.arange(4).expand(2, -1),
        torch.arange(4, 16).expand(2, -1),
    )

    loss = model(images, visible, masked)

    patches = patchify(images, 8)
    predicted, total = model.predict(patches, visible, masked), 0.0
    for b in range(2):
        for place, patch in enumerate(range(4, 16)):
            pixels = patches[b, patch]
            target = (pixels - pixels.mean()) / (pixels.var(unbiased=True) + 1e-6).sqrt()
            total += (predicted[b, place] - target).square().mean().item()
    assert loss.item() == pytest.approx(total / 24, rel=1e-5)


def losses_of(model: MAE, images: torch.Tensor, visible: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Of each predicted patch."""
    patches = patchify(images, model.patch)
    tokens = model.decoder_tokens(model.encode(gather(patches, visible), visible), visible, predicted)
    return model.losses(patches, tokens, predicted)


@pytest.mark.parametrize(
    ("rows", "cols", "patch", "normalised"), [(7, 14, 8, True), (3, 2, 14, False), (2, 5, 4, True)]
)
def test_on_any_grid_the_loss_is_the_slow_twins(rows, cols, patch, normalised):
    sizes = {"patch": patch, "embed_dim": 16, "depth": 1, "heads": 2, "norm_pix_loss": normalised}
    sizes |= {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    model = MAE(size=(rows * patch, cols * patch), **sizes)
    images = torch.randn(2, 3, rows * patch, cols * patch)
    ids = torch.stack([torch.randperm(rows * cols) for _ in images])
    visible, predicted = ids[:, : rows * cols // 4], ids[:, rows * cols // 2 :]

    losses = losses_of(model, images, visible, predicted)

    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    for b in range(2):
        seen = images[b].double(), visible[b].tolist(), predicted[b].tolist()
        expected = mae_step.losses(weights, SimpleNamespace(**sizes), *seen)
        assert losses[b].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert model(images, visible, predicted).item() == pytest.approx(losses.mean().item(), rel=1e-6)


def test_the_loss_of_a_subset_is_not_that_of_all_and_needs_no_others(model):
    """49 of 147, say: the decoder has no token for a masked patch that is not predicted."""
    images, visible, predicted = torch.randn(1, 3, 32, 32), torch.tensor([[0, 5, 6]]), torch.tensor([[1, 9]])
    latent = model.encode(patchify(images, 8)[:, [0, 5, 6]], visible)

    tokens = model.decoder_tokens(latent, visible, predicted)

    assert tokens.shape == (1, 1 + 3 + 2, 16)
    assert losses_of(model, images, visible, predicted).shape == (1, 2)
    alone = model.decoder_tokens(latent, visible, predicted[:, :0])
    assert torch.equal(alone, tokens[:, :4])


def test_a_weight_on_a_visible_patch_exists_in_the_backward_pass_alone(model):
    """AutoMAE's: the gradient of a weight is (embedded patch, its gradient), and nothing else feels it."""
    patches = torch.randn(1, 3, 192, requires_grad=True)
    ids, weights = torch.tensor([[9, 2, 14]]), torch.tensor([[0.3, 0.8, 0.0]], requires_grad=True)
    towards = torch.randn(1, 4, 32)

    weighted = model.encode(patches, ids, weights)
    felt, of_patches = torch.autograd.grad((weighted * towards).sum(), [weights, patches])

    plain = model.encode(patches, ids)
    (of_plain,) = torch.autograd.grad((plain * towards).sum(), patches)
    assert torch.equal(weighted, plain)
    assert torch.allclose(of_patches, of_plain, atol=1e-6)
    projection = model.encoder.patch_embed.proj.weight.flatten(1)
    bias = model.encoder.patch_embed.proj.bias
    embedded = (patches @ projection.T + bias + model.encoder.pos_embed[:, 1 + ids[0]]).detach()
    gradient = of_plain @ torch.linalg.pinv(projection)
    assert torch.allclose(felt, (embedded * gradient).sum(dim=-1), atol=1e-4)


def test_a_reconstruction_keeps_what_was_visible(model):
    images, visible, masked = torch.randn(1, 3, 32, 32), torch.tensor([[0, 5]]), torch.tensor([[1, 2]])

    rebuilt = patchify(model.reconstruct(images, visible, masked), 8)

    assert torch.equal(rebuilt[0, [0, 5]], patchify(images, 8)[0, [0, 5]])
    assert (rebuilt[0, 7] == 0).all()


def test_raw_targets_are_rebuilt_as_they_are_predicted(model):
    raw = MAE(
        size=32, patch=8, embed_dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2,
        norm_pix_loss=False,
    ).eval()  # fmt: skip
    raw.load_state_dict(model.state_dict())
    images, visible, masked = torch.randn(1, 3, 32, 32), torch.tensor([[0, 5]]), torch.tensor([[1, 2]])
    patches = patchify(images, 8)

    rebuilt, normalised = (patchify(one.reconstruct(images, visible, masked), 8)[0, [1, 2]] for one in (raw, model))

    predicted = model.predict(patches, visible, masked)[0]
    assert torch.equal(rebuilt, predicted)
    truth = patches[0, [1, 2]]
    expected = predicted * (truth.var(dim=1, keepdim=True) + 1e-6).sqrt() + truth.mean(dim=1, keepdim=True)
    assert torch.allclose(normalised, expected, atol=1e-5)


def test_patches_come_back():
    images = torch.randn(2, 3, 24, 40)

    assert torch.equal(unpatchify(patchify(images, 8), 8, rows=3), images)


def test_a_flat_patch_is_no_division_by_zero():
    assert torch.isfinite(normalised_per_patch(torch.full((1, 1, 192), 0.3))).all()
