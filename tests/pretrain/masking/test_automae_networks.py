"""AutoMAE's generator and discriminator: their masks, who learns from what, and the documented hazards."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference import automae as twin
from some_inputs import TINY, inputs_of
from watch import watching

from pretrain.config import PretrainConfig, StreamRun
from pretrain.mae import MAE
from pretrain.masking.automae import AutoMAE, Generator, attention_shares, gumbel
from pretrain.masking.discriminator import CORNERS, Discriminator, rectangles
from pretrain.objective import Objective
from shards.rng import GUMBEL, MASK

SIZES = SimpleNamespace(norm_pix_loss=True, **TINY)


@given(
    shape=st.sampled_from([(4, 4), (7, 7), (7, 14)]),
    ratio=st.sampled_from([0.4, 0.75, 0.85]),
    share=st.sampled_from([1.0, 0.5]),
    select=st.sampled_from(["visible", "masked"]),
    seed=st.integers(0, 99),
)
@hypothesis_settings(max_examples=8)
def test_masks_are_the_papers_on_every_grid_of_kept_patches(shape, ratio, share, select, seed):
    inputs = inputs_of(
        "automae", images=2, shape=shape, seed=seed, mask_ratio=ratio, keep_share=share, automae_select=select
    )
    masking, patches, kept = masking_for(inputs), shape[0] * shape[1], inputs.kept.shape[1]
    visible = int(kept * (1 - ratio))
    state = {f"masking.{name}": one.double() for name, one in masking.state_dict().items()}

    masks = masking.masked(inputs, 0.5)

    noise, drawn_gumbel = inputs.uniform(MASK, kept).tolist(), inputs.uniform(GUMBEL, patches).tolist()
    for row in range(2):
        attention = torch.from_numpy(inputs.batch.attention[row]).double()
        p = twin.probabilities(twin.logits(state, attention), twin.gumbel(drawn_gumbel[row]))
        selected = visible if select == "visible" else kept - visible
        found = twin.scores(p, noise[row], inputs.kept[row].tolist(), selected)
        assert (masks.ids_visible[row].tolist(), masks.ids_masked[row].tolist()) == twin.split(found, visible)


def masking_for(inputs: Any) -> AutoMAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoMAE(inputs.config, tiny_mae(), 3)


def tiny_mae(size: int = 32) -> MAE:
    return MAE(size=size, **TINY)


@given(shape=st.sampled_from([(4, 4), (7, 14), (14, 14), (28, 28)]), seed=st.integers(0, 10**6))
@hypothesis_settings(max_examples=20)
def test_rectangles_are_the_released_codes_and_as_large_a_share_of_other_grids(shape, seed):
    draws = torch.from_numpy(np.random.default_rng(seed).random((1, CORNERS + shape[0] * shape[1])))

    found = rectangles(draws, shape)

    torch.testing.assert_close(found[0].double(), twin.rectangle(draws[0].tolist(), *shape), rtol=1e-5, atol=0)


def test_the_generator_learns_from_visible_patches_alone():
    """At the noise n, d/dn_i = p_i (g_i - sum_j p_j g_j), where g_i is what reaches p_i: nothing where i is masked."""
    inputs = inputs_of("automae", images=3, shape=(4, 4))
    masking, mae = masking_for(inputs), tiny_mae()
    masks = masking.masked(inputs, 0.5)
    attention, noise = masks.extra
    noise.requires_grad_()

    loss = masking.loss(mae, torch.rand(3, 3, 32, 32), masks.ids_visible, masks.ids_predicted, attention, noise)
    p = (masking.generator(attention) + noise).softmax(dim=1)
    adversarial = 0.2 * (masking.discriminator(p.unflatten(1, (4, 4))) - 1).square().mean()
    (whole,), (judged,) = (torch.autograd.grad(one, noise) for one in (loss, adversarial))

    reached = ((whole - judged) / p).detach().double()
    visible, masked = (
        (reached - reached.gather(1, masks.ids_masked[:, :1])).gather(1, ids).abs()
        for ids in (masks.ids_visible, masks.ids_masked)
    )
    assert visible.min() > 10 * masked.max()


def test_what_reconstruction_teaches_the_generator_is_the_papers():
    """A discriminator that is shown next to nothing has next to no gradient."""
    inputs = inputs_of("automae", images=2, shape=(4, 4), automae_gan_scale=1e-12)
    masking, mae = masking_for(inputs), tiny_mae()
    masks, images = masking.masked(inputs, 0.5), torch.rand(2, 3, 32, 32)
    ours = dict(masking.generator.named_parameters(prefix="masking.generator"))
    state = {name: one.detach().double() for name, one in Objective(mae, masking).named_parameters()}
    leaves = {name: state[name].requires_grad_() for name in ours}

    loss = masking.loss(mae, images, masks.ids_visible, masks.ids_predicted, *masks.extra)
    found = torch.autograd.grad(loss, list(ours.values()))

    losses = []
    for row in range(2):
        attention, noise = (one[row].double() for one in masks.extra)
        factors = dict(enumerate(0.5 * twin.probabilities(twin.logits(state, attention), noise)))
        ids = masks.ids_visible[row].tolist(), masks.ids_masked[row].tolist()
        losses.append(twin.reconstruction(state, SIZES, images[row].double(), *ids, factors))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    for name, one, other in zip(ours, found, expected, strict=True):
        assert other.abs().max() > 0
        assert (one - other).abs().max() < 1e-4 * other.abs().max(), name


def test_in_the_joint_step_neither_the_attention_nor_the_discriminator_learns():
    inputs = inputs_of("automae", images=3, shape=(4, 4))
    masking, mae = masking_for(inputs), tiny_mae()
    before = {name: one.clone() for name, one in masking.discriminator.state_dict().items()}
    masks = masking.masked(inputs, 0.5)

    loss = masking.loss(mae, torch.rand(3, 3, 32, 32), masks.ids_visible, masks.ids_predicted, *masks.extra)
    loss.backward()

    assert not any(one.requires_grad for one in masks.extra)
    for weight in masking.discriminator.parameters():
        assert weight.grad is None
        assert not weight.requires_grad
    assert all(torch.equal(one, before[name]) for name, one in masking.discriminator.state_dict().items())
    assert all(weight.grad.abs().max() > 0 for weight in masking.generator.parameters())


def test_in_its_own_step_the_discriminator_alone_learns():
    inputs = inputs_of("automae", images=3, shape=(7, 7))
    masking = masking_for(inputs)
    before = {name: one.clone() for name, one in masking.named_parameters()}

    masking.begin(inputs, 1e-2)

    changed = {name for name, one in masking.named_parameters() if not torch.equal(one, before[name])}
    assert changed == {name for name in before if name.startswith("discriminator")}
    assert all(
        weight.grad is None and (weight.requires_grad == ("generator" in name))
        for name, weight in masking.named_parameters()
    )


@pytest.mark.parametrize("cells", [(7, 14), (8, 8), (14, 28)])
def test_a_patch_has_its_share_of_the_attention_however_many_cells_are_stored(cells):
    inputs = inputs_of("automae", shape=(7, 14), cells=cells)

    found = attention_shares(inputs)

    assert found.shape == (4, 3, 7, 14)
    stored = torch.from_numpy(inputs.batch.attention)
    torch.testing.assert_close(found.sum(dim=(2, 3)), stored.sum(dim=(2, 3)))


def test_in_bf16_both_networks_compute_as_in_fp32():
    inputs = inputs_of("automae", images=3, shape=(4, 4))
    masking, mae = masking_for(inputs), tiny_mae()
    masks = masking.masked(inputs, 0.5)
    images = torch.rand(3, 3, 32, 32)

    with watching(Generator) as made, watching(Discriminator) as judged:
        for precise in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
                masking.loss(mae, images, masks.ids_visible, masks.ids_predicted, *masks.extra)

    for outputs in (made.outputs, judged.outputs):
        assert torch.equal(*outputs)


def test_noise_is_gumbels_and_finite_at_both_ends():
    ends = gumbel(torch.tensor([[0.0, 1 - 2.0**-24]]))
    many = gumbel(torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0)))

    assert ends.isfinite().all()
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert many.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.05)


def test_the_mends_take_the_peak_away_and_let_the_discriminator_reach_its_target():
    released, mended = (
        inputs_of("automae", images=8, **settings)
        for settings in ({}, {"automae_gan_input": "softmax", "automae_gan_scale": 196.0})
    )
    figures = []
    for inputs in (released, mended):
        masking = masking_for(inputs)
        for epoch in range(60):
            later = dataclasses.replace(inputs.batch, epochs=inputs.batch.epochs + epoch)
            masking.begin(dataclasses.replace(inputs, batch=later), 2.4e-3)
        masks = masking.masked(inputs, 0.5)
        masking.loss(tiny_mae(112), torch.rand(8, 3, 112, 112), masks.ids_visible, masks.ids_predicted, *masks.extra)
        figures.append(masking.figures())

    before, after = figures
    assert before["fake_peak"] > 10 * before["real_peak"]
    assert after["fake_peak"] < after["real_peak"]
    assert before["d_real"] < 0.3
    assert abs(before["d_real"] - before["d_fake"]) < 0.1
    assert after["d_real"] > 0.6
    assert after["d_fake"] < 0.4


@pytest.mark.parametrize("field", ["automae_attention_scale", "automae_gan_scale"])
def test_a_scale_of_nothing_is_a_sentence(field):
    with pytest.raises(ValueError, match=field):
        PretrainConfig(data="x", masking="automae", run=StreamRun(out=Path("x")), **{field: 0.0})


def test_a_step_of_the_discriminator_that_is_not_finite_is_left_out_told_once_and_counted(capfd):
    inputs = inputs_of("automae", images=4, shape=(4, 4), automae_gan_scale=1e38)
    masking = masking_for(inputs)
    before = [weight.clone() for weight in masking.discriminator.parameters()]

    for _ in range(2):
        masking.begin(inputs, 0.1)

    assert all(map(torch.equal, before, masking.discriminator.parameters()))
    assert masking.d_skipped == 2
    assert capfd.readouterr().err.count("the gradient of automae's discriminator is not finite") == 1
