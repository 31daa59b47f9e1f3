"""Algorithm 1: exact counts, the worked table, and a loop written from the paper."""

import dataclasses
from fractions import Fraction
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.algorithm1 import counts, mask_of

from pretrain.config import PretrainConfig
from pretrain.masking.budget import lowest, masked_count, purity
from pretrain.masking.inputs import Inputs
from pretrain.masking.semmae import alpha_at, masked_per_part, semantic_scores
from pretrain.masking.strategies import STRATEGIES
from shards.batches import Batch
from shards.rng import PART_ORDER

awkward_sizes = st.lists(st.one_of(st.just(0), st.just(1), st.integers(0, 40)), min_size=1, max_size=9).filter(
    lambda sizes: sum(sizes) > 1
)
TABLE = [  # method reference, section 4: n = 5 0 12 9 3 20, L = 49, M = 37
    ([2, 5, 3, 0, 4, 1], 0.0, [4, 0, 9, 7, 2, 15]),
    ([2, 5, 3, 0, 4, 1], 0.5, [2, 0, 10, 6, 1, 18]),
    ([2, 5, 3, 0, 4, 1], 1.0, [0, 0, 12, 5, 0, 20]),
    ([3, 5, 0, 1, 4, 2], 0.25, [4, 0, 7, 7, 3, 16]),
    ([3, 5, 0, 1, 4, 2], 0.5, [4, 0, 4, 8, 3, 18]),
    ([3, 5, 0, 1, 4, 2], 0.75, [5, 0, 2, 8, 3, 19]),
    ([3, 5, 0, 1, 4, 2], 1.0, [5, 0, 0, 9, 3, 20]),
]


def noise_of(order: list[int]) -> torch.Tensor:
    """Noise that sorts the parts into `order`."""
    noise = torch.empty(1, len(order))
    noise[0, order] = torch.arange(len(order)) / len(order)
    return noise


def labels_of(sizes: list[int], seed: int = 0) -> torch.Tensor:
    flat = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))][None]


def semantic_masking(labels, noise, part_order, *, mask_ratio: float, alpha: float) -> torch.Tensor:
    masked = masked_count(labels.shape[1], mask_ratio)
    return lowest(semantic_scores(labels, noise, part_order, masked=masked, alpha=alpha), masked)


def masked_counts(mask: torch.Tensor, labels: torch.Tensor, parts: int) -> list[int]:
    return [int((mask[0] & (labels[0] == part)).sum()) for part in range(parts)]


@pytest.mark.parametrize(("order", "alpha", "expected"), TABLE)
def test_the_worked_table_of_the_method_page(order, alpha, expected):
    sizes = [5, 0, 12, 9, 3, 20]

    found = masked_per_part(torch.tensor([sizes]), torch.tensor([order]), 37, alpha)

    assert masked_count(49, 0.75) == 37
    assert found[0].tolist() == expected


@given(
    sizes=awkward_sizes,
    ratio=st.sampled_from([0.25, 0.5, 0.6, 0.75, 0.9]),
    alpha=st.fractions(0, 1, max_denominator=60),
    data=st.data(),
)
def test_counts_are_those_of_the_loop(sizes, ratio, alpha, data):
    order = data.draw(st.permutations(range(len(sizes))))
    masked = masked_count(sum(sizes), ratio)

    found = masked_per_part(torch.tensor([sizes]), torch.tensor([order]), masked, float(alpha))

    assert found[0].tolist() == counts(sizes, list(order), masked, alpha)


def test_parts_that_tie_exactly_tie_whatever_alpha_is():
    """Parts of 1, 1 and 4 patches, masked whole when their turn comes: each wants 2/3 + alpha/3 of a patch more."""
    sizes, order, alpha = [3, 0, 3, 1, 1, 4], [0, 3, 4, 5, 1, 2], Fraction(27, 343)

    found = masked_per_part(torch.tensor([sizes]), torch.tensor([order]), 8, float(alpha))

    assert found[0].tolist() == counts(sizes, order, 8, alpha) == [2, 0, 2, 1, 1, 2]


@given(sizes=awkward_sizes, ratio=st.floats(0.05, 0.95), alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_image_masks_the_same_count_and_no_part_overdraws(sizes, ratio, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([labels_of(sizes, seed), labels_of(sizes[::-1], seed), torch.zeros(1, sum(sizes)).long()])

    mask = semantic_masking(
        labels,
        torch.rand(labels.shape, generator=generator),
        torch.rand(3, len(sizes), generator=generator),
        mask_ratio=ratio,
        alpha=alpha,
    )

    assert (mask.sum(dim=1) == masked_count(sum(sizes), ratio)).all()


@given(sizes=awkward_sizes, ratio=st.sampled_from([0.25, 0.75, 0.9]), eighths=st.integers(0, 8), data=st.data())
def test_the_mask_is_the_loops_patch_by_patch(sizes, ratio, eighths, data):
    labels = labels_of(sizes, data.draw(st.integers(0, 99)))
    order = data.draw(st.permutations(range(len(sizes))))
    noise = torch.tensor([data.draw(st.permutations(range(sum(sizes))))]) / 512

    mask = semantic_masking(labels, noise, noise_of(order), mask_ratio=ratio, alpha=eighths / 8)

    masked = counts(sizes, list(order), masked_count(sum(sizes), ratio), Fraction(eighths, 8))
    assert mask[0].tolist() == mask_of(labels[0].tolist(), noise[0].tolist(), masked)


def test_more_groups_than_patches_is_fine():
    labels = torch.tensor([[7, 0, 11, 3]])

    mask = semantic_masking(labels, torch.rand(1, 4), torch.rand(1, 12), mask_ratio=0.5, alpha=1.0)

    assert mask.sum() == 2


@given(sizes=awkward_sizes, seed=st.integers(0, 99))
def test_at_alpha_1_at_most_one_part_is_cut(sizes, seed):
    labels = labels_of(sizes, seed)
    generator = torch.Generator().manual_seed(seed)

    mask = semantic_masking(
        labels,
        torch.rand(labels.shape, generator=generator),
        torch.rand(1, len(sizes), generator=generator),
        mask_ratio=0.75,
        alpha=1.0,
    )

    found = masked_counts(mask, labels, len(sizes))
    assert sum(0 < masked < size for masked, size in zip(found, sizes, strict=True)) <= 1
    there = sum(size > 0 for size in sizes)
    assert purity(mask, labels, len(sizes)).item() >= (there - 1) / there - 1e-6


def test_inside_a_part_the_least_noise_is_hidden():
    labels, noise = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]]), torch.tensor([[8, 7, 6, 5, 4, 3, 2, 1]]) / 10

    mask = semantic_masking(labels, noise, torch.rand(1, 2), mask_ratio=0.5, alpha=0.0)

    assert mask.tolist() == [[False, False, False, False, True, True, True, True]]


def test_a_mask_depends_on_its_own_row_alone():
    labels, noise, order = torch.randint(0, 7, (8, 49)), torch.rand(8, 49), torch.rand(8, 7)

    together = semantic_masking(labels, noise, order, mask_ratio=0.75, alpha=0.4)

    for row in range(8):
        alone = semantic_masking(
            labels[row : row + 1], noise[row : row + 1], order[row : row + 1], mask_ratio=0.75, alpha=0.4
        )
        assert torch.equal(alone[0], together[row])


def a_batch(images: int, patches: int, parts: int, seed: int, epoch: int = 3) -> Inputs:
    labels = torch.randint(0, parts, (images, patches), generator=torch.Generator().manual_seed(seed))
    nothing, indices = np.zeros((images, 1, 1)), np.arange(images) + 10
    pixels, cells, ranks = np.zeros((images, 1, 1, 3), np.uint8), nothing.astype(np.uint8), nothing.astype(np.uint16)
    whole = Batch(pixels, cells, ranks, indices, indices, np.full(images, epoch), 0)
    return Inputs(whole, labels, parts, masked_count(patches, 0.75), gamma=2.0, seed=seed)


def part_of(inputs: Inputs, rows: slice) -> Inputs:
    names = ("images", "parts", "fgrank", "class_ids", "indices", "epochs")
    batch = dataclasses.replace(inputs.batch, **{name: getattr(inputs.batch, name)[rows] for name in names})
    return dataclasses.replace(inputs, batch=batch, labels=inputs.labels[rows])


@pytest.mark.parametrize("name", STRATEGIES)
@given(patches=st.integers(4, 60), parts=st.integers(2, 8), progress=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_masking_masks_exactly_its_budget_and_each_image_by_itself(name, patches, parts, progress, seed):
    inputs = a_batch(4, patches, parts, seed)

    scores = STRATEGIES[name](inputs, progress)
    mask = lowest(scores, inputs.masked)

    assert scores.isfinite().all()
    assert (mask.sum(dim=1) == inputs.masked).all()
    assert torch.equal(scores, STRATEGIES[name](inputs, progress))
    alone = [STRATEGIES[name](part_of(inputs, slice(row, row + 1)), progress) for row in range(4)]
    assert torch.equal(torch.cat(alone), scores)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_masking_draws_anew_for_each_image_epoch_and_seed(name):
    masks = [
        lowest(STRATEGIES[name](a_batch(2, 196, 6, seed, epoch), 0.5), 147)[row]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
        for row in range(2)
    ]

    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


def test_the_maskings_of_the_config_are_those_there_are():
    assert set(get_args(get_type_hints(PretrainConfig)["masking"])) == set(STRATEGIES)


def test_random_masking_masks_the_least_noise():
    inputs = a_batch(5, 196, 3, 0)

    mask = lowest(STRATEGIES["random"](inputs, 0.5), inputs.masked)

    assert inputs.masked == 147
    assert (inputs.noise[mask].reshape(5, -1).amax(1) < inputs.noise[~mask].reshape(5, -1).amin(1)).all()


@given(sizes=awkward_sizes, alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_semantic_scores_below_0_are_the_mask(sizes, alpha, seed):
    labels, masked = labels_of(sizes, seed), masked_count(sum(sizes), 0.75)

    scores = semantic_scores(labels, torch.rand(labels.shape), torch.rand(1, len(sizes)), masked=masked, alpha=alpha)

    assert torch.equal(lowest(scores, masked), scores < 0)


@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_semmae_masks_by_its_progress_and_gamma(gamma):
    inputs = dataclasses.replace(a_batch(3, 49, 5, 0), gamma=gamma)
    order = inputs.uniform(PART_ORDER, 5)

    expected = semantic_scores(inputs.labels, inputs.noise, order, masked=inputs.masked, alpha=0.5**gamma)

    assert torch.equal(STRATEGIES["semmae"](inputs, 0.5), expected)


def test_alpha_goes_from_0_to_1_with_progress():
    assert [alpha_at(progress, 2.0) for progress in (0, 0.5, 1, 1.5)] == [0, 0.25, 1, 1]
