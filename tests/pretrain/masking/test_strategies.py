"""What every masking that learns nothing keeps to, and the rivals beside slow twins from their papers."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import rival_masks
from some_inputs import MASKINGS, inputs_of, of, scores_of

from pretrain.config import PretrainConfig, StreamRun
from pretrain.masking.batch import mask_batch, masked_by
from pretrain.masking.color_noise import band
from pretrain.masking.config import BELONGS, MaskingConfig
from pretrain.masking.inputs import Inputs
from pretrain.masking.strategies import STRATEGIES
from pretrain.objective import LEARNED
from shards.rng import BLOCK, COLOR, MASK

shapes = st.sampled_from([(7, 7), (14, 14), (28, 28), (7, 14)])
ratios = st.sampled_from([0.4, 0.5, 0.6, 0.75, 0.9])


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    batch = inputs.batch
    names = ("images", "parts", "fgrank", "class_ids", "indices", "epochs", "attn", "attn_peak")
    parts = {name: getattr(batch, name)[rows] for name in names}
    return Inputs(dataclasses.replace(batch, **parts), inputs.config, inputs.seed, inputs.shape, inputs.groups)


def masked_sets(inputs: Inputs, progress: float = 0.5) -> list[set[int]]:
    return [set(row) for row in masked_by(scores_of(inputs, progress), inputs).ids_masked.tolist()]


@pytest.mark.parametrize("name", MASKINGS)
@settings(max_examples=40)
@given(
    shape=shapes,
    groups=st.integers(1, 8),
    ratio=ratios,
    share=st.sampled_from([1.0, 0.5]),
    progress=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_masking_masks_its_budget_of_the_kept_patches_whatever_it_is_shown(
    name, shape, groups, ratio, share, progress, seed
):
    inputs = of(
        name, images=2, shape=shape, cells=(28, 28), groups=groups, seed=seed, mask_ratio=ratio, keep_share=share
    )
    kept = inputs.kept.shape[1]

    scores = scores_of(inputs, progress)
    masked = masked_by(scores, inputs)

    assert scores.isfinite().all()
    assert masked.ids_visible.shape == (2, int(kept * (1 - ratio)))
    assert masked.ids_masked.shape == (2, kept - int(kept * (1 - ratio)))
    for row in range(2):
        visible, hidden = masked.ids_visible[row].tolist(), masked.ids_masked[row].tolist()
        assert sorted(visible + hidden) == inputs.kept[row].tolist()
        assert (visible, hidden) == (sorted(visible), sorted(hidden))


@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize("shape", [(7, 7), (7, 14)])
def test_a_mask_is_the_same_alone_and_in_any_batch_on_any_number_of_ranks(name, shape):
    inputs = of(name, images=6, shape=shape)

    together = masked_sets(inputs, 0.7)

    for row in range(6):
        assert masked_sets(rows_of(inputs, slice(row, row + 1)), 0.7) == [together[row]]


@pytest.mark.parametrize("name", sorted(set(MASKINGS) - {"attmask-high", "attmask-low"}))
def test_every_image_epoch_and_seed_has_draws_of_its_own(name):
    alike = of(name, images=2)
    for stored in ("images", "parts", "fgrank", "attn", "attn_peak"):
        of_image = getattr(alike.batch, stored)
        of_image[1] = of_image[0]
    another = dataclasses.replace(alike, seed=1)
    later = dataclasses.replace(alike, batch=dataclasses.replace(alike.batch, epochs=alike.batch.epochs + 1))

    masks = [mask for inputs in (alike, another, later) for mask in masked_sets(inputs)]

    assert len({tuple(sorted(mask)) for mask in masks}) == len(masks)


@pytest.mark.parametrize("name", STRATEGIES)
def test_flat_labels_ranks_and_attention_give_masks_that_prefer_no_place_and_blocks_the_middle(name):
    """An image that says nothing of its parts: over many images each patch is masked as often as any other."""
    inputs = inputs_of(name, images=600, shape=(7, 7), groups=2)
    inputs.batch.parts[:], inputs.batch.attn[:] = 0, 7
    inputs.batch.fgrank[:] = 0
    inputs = dataclasses.replace(inputs, background=0)

    often = torch.zeros(49).scatter_add_(0, mask_batch(inputs, 0.5).ids_masked.flatten(), torch.ones(600 * 37))

    if name == "block":  # rectangles reach the border less often than the middle
        middle = often.reshape(7, 7)[2:5, 2:5]
        border = (often.sum() - often.reshape(7, 7)[1:6, 1:6].sum()) / 24
        assert middle.min() > border
    else:
        assert (often / 600 - 37 / 49).abs().max() < 0.1


def test_the_maskings_of_the_config_are_those_there_are():
    assert set(get_args(get_type_hints(PretrainConfig)["masking"])) == {*STRATEGIES, *LEARNED}


@given(
    shape=st.sampled_from([(7, 7), (14, 14), (7, 14)]), unit=st.integers(2, 4), ratio=ratios, seed=st.integers(0, 99)
)
def test_random_squares_are_simmims(shape, unit, ratio, seed):
    inputs = inputs_of("random", images=2, shape=shape, seed=seed, mask_unit=unit, mask_ratio=ratio)
    noise = inputs.uniform(MASK, shape[0] * shape[1]).tolist()

    masks = masked_sets(inputs)

    assert masks == [rival_masks.in_squares(row, shape, unit, inputs.masked) for row in noise]


def test_random_masking_masks_the_least_noise():
    inputs = inputs_of("random")

    assert masked_sets(inputs) == [rival_masks.lowest(row, 147) for row in inputs.noise.tolist()]


@given(shape=shapes, ratio=ratios, seed=st.integers(0, 99))
def test_rectangles_are_beits(shape, ratio, seed):
    inputs = inputs_of("block", images=2, shape=shape, seed=seed, mask_ratio=ratio)
    draws = inputs.uniform(BLOCK, 4 * 64).double().unflatten(1, (64, 4)).tolist()

    masks = masked_sets(inputs)

    for mask, row, noise in zip(masks, draws, inputs.noise.tolist(), strict=True):
        assert mask == rival_masks.in_rectangles(row, shape, inputs.masked, noise)


@pytest.mark.parametrize("color", ["red", "green", "blue", "purple"])
@pytest.mark.parametrize("shape", [(7, 7), (7, 14)])
def test_filtered_noise_is_colormaes(color, shape):
    """Its taps are whole numbers of 12 bits, so a patch on the edge of the budget may fall to the other side."""
    inputs = inputs_of("color-noise", images=4, shape=shape, noise_color=color)
    rows, cols = (side + 10 for side in shape)
    white = inputs.uniform(COLOR, rows * cols).double().unflatten(1, (rows, cols)).tolist()

    masks = masked_sets(inputs)

    for mask, noise in zip(masks, white, strict=True):
        assert len(mask - rival_masks.in_noise(noise, color, inputs.masked)) <= 1


def test_a_filters_taps_keep_a_flat_image_flat_to_the_last_bit():
    assert (band(14, 0.5).sum(dim=1) == 4096).all()
    assert band(3, 2.0)[2, 2:13].tolist() == band(1, 2.0)[0].tolist()


def test_blobs_of_red_noise_are_larger_than_those_of_green_than_of_blue():
    def neighbours_alike(color: str) -> float:
        masked = mask_batch(inputs_of("color-noise", images=64, noise_color=color), 0.5).ids_masked
        grid = torch.zeros(64, 196).scatter_(1, masked, 1.0).reshape(64, 14, 14)
        return (grid[:, :, 1:] == grid[:, :, :-1]).float().mean().item()

    red, green, blue = map(neighbours_alike, ("red", "green", "blue"))

    assert red > green + 0.05
    assert green > blue + 0.03


def attention_of(inputs: Inputs) -> list[list[float]]:
    """Summed over heads, as float32 sums them; a patch is a cell here."""
    return [
        [sum(np.float32(head[patch]) for head in image) for patch in range(image.shape[1])]
        for image in inputs.batch.attention.reshape(len(inputs.batch.images), 3, -1)
    ]


def test_attmask_high_masks_the_highest_attention_and_low_the_lowest():
    for name, sign in (("attmask-high", -1), ("attmask-low", 1)):
        inputs = inputs_of(name, mask_ratio=0.6)
        scores = [[sign * value for value in row] for row in attention_of(inputs)]

        assert masked_sets(inputs) == [rival_masks.lowest(row, inputs.masked) for row in scores]


def test_hints_are_shown_of_the_highest_tenth_and_others_masked_in_their_place():
    inputs = inputs_of("attmask-hint", images=32)
    attention = attention_of(inputs)

    shown_places = set()
    for mask, row in zip(masked_sets(inputs), attention, strict=True):
        by_height = sorted(range(196), key=lambda patch: -row[patch])
        shown = [place for place, patch in enumerate(by_height) if place < 19 and patch not in mask]
        assert len(shown) == 14  # a tenth of 147
        assert mask >= set(by_height[19:147])
        assert mask == set(by_height[: 147 + 14]) - {by_height[place] for place in shown}
        shown_places |= set(shown)
    assert shown_places == set(range(19))


def test_without_hints_attmask_hint_is_attmask_high():
    hints, high = inputs_of("attmask-hint", hint_share=0.0), inputs_of("attmask-high")

    assert masked_sets(hints) == masked_sets(high)


@pytest.mark.parametrize("odds", [1, 4, 9])
def test_the_next_patch_masked_is_of_the_foreground_with_the_odds_that_were_asked_for(odds):
    """One patch of 49 is masked, 12 are foreground: n · 12 / (n · 12 + 37) of 4,000 images, to four deviations."""
    inputs = inputs_of("foreground", images=4000, shape=(7, 7), groups=2, foreground_odds=odds, mask_ratio=0.02)
    inputs.batch.parts.reshape(4000, 49)[:] = np.arange(49) >= 12
    inputs = dataclasses.replace(inputs, background=1)
    expected = odds * 12 / (odds * 12 + 37)

    first = mask_batch(inputs, 0.5).ids_masked

    assert first.shape == (4000, 1)
    deviation = (expected * (1 - expected) / 4000) ** 0.5
    assert abs((first < 12).double().mean().item() - expected) < 4 * deviation


@pytest.mark.parametrize(("share", "expected"), [(None, 24), (0.25, 12)])
def test_without_a_background_label_the_foreground_is_the_best_by_rank(share, expected):
    inputs = inputs_of("foreground", shape=(7, 7), foreground_odds=1000, foreground_share=share, mask_ratio=0.2)
    best = [set(np.argsort(row.flatten())[:expected].tolist()) for row in inputs.batch.fgrank]

    masks = masked_sets(inputs)

    assert inputs.masked == 10
    assert all(mask <= front for mask, front in zip(masks, best, strict=True))


@given(predicted=st.integers(1, 200), seed=st.integers(0, 9))
def test_as_many_masked_patches_are_predicted_as_was_asked_for(predicted, seed):
    inputs = inputs_of("semmae", images=3, seed=seed, predicted=predicted)

    masked = mask_batch(inputs, 0.5)

    assert masked.ids_predicted.shape == (3, min(predicted, 147))
    for chosen, hidden in zip(masked.ids_predicted.tolist(), masked.ids_masked.tolist(), strict=True):
        assert set(chosen) <= set(hidden)
        assert chosen == sorted(chosen)
    assert predicted > 140 or not torch.equal(masked.ids_predicted[0], masked.ids_masked[0, :predicted])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"masking": "random", "gamma": 1.0}, "--gamma belongs to --masking semmae"),
        ({"noise_color": "red"}, "--noise-color belongs to --masking color-noise"),
        ({"alpha": 0.5, "gamma": 3.0}, "--alpha is one value for the whole run"),
        ({"curriculum": "cosine", "gamma": 1.0}, "--curriculum cosine has no exponent"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        PretrainConfig(data="x", run=StreamRun(out=Path("x")), **settings)


def test_every_setting_that_belongs_to_a_masking_is_one_of_the_config():
    assert set(BELONGS) <= {field.name for field in dataclasses.fields(MaskingConfig)}
    assert {name for owners in BELONGS.values() for name in owners} <= {*STRATEGIES, *LEARNED}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("foreground_share", 0.0),
            ("alpha", 1.1),
            ("hint_share", -0.1),
            ("hard_share", 1.1),
            ("mask_unit", 0),
            ("predicted", 0),
        ],
        *[("foreground_odds", 0), ("gamma", float("inf"))],
    ],
)
def test_a_mask_setting_out_of_range_is_a_sentence(field, value):
    with pytest.raises(ValueError, match=field):
        PretrainConfig(data="x", run=StreamRun(out=Path("x")), **{field: value})
