"""Algorithm 1: exact counts, the worked table, and a loop written from the paper."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.algorithm1 import counts, mask_of, released_mask
from some_inputs import inputs_of

from pretrain.masking.budget import lowest, masked_count, purity_and_touched
from pretrain.masking.config import MaskingConfig
from pretrain.masking.semmae import alpha_at, masked_per_part, released_scores, semantic_scores
from pretrain.masking.strategies import STRATEGIES
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
    purity, touched = purity_and_touched(mask, labels, len(sizes)).tolist()
    assert purity >= (there - 1) / there - 1e-6
    assert touched == pytest.approx(sum(count > 0 for count in found) / there)


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


@given(sizes=awkward_sizes, alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_semantic_scores_below_0_are_the_mask(sizes, alpha, seed):
    labels, masked = labels_of(sizes, seed), masked_count(sum(sizes), 0.75)

    scores = semantic_scores(labels, torch.rand(labels.shape), torch.rand(1, len(sizes)), masked=masked, alpha=alpha)

    assert torch.equal(lowest(scores, masked), scores < 0)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        *[({}, 0.25), ({"gamma": 3.0}, 0.125), ({"alpha": 0.4}, 0.4), ({"curriculum": "cosine"}, 0.5)],
        *[({"curriculum": "falling", "gamma": 1.0}, 0.5), ({"curriculum": "released"}, (400 / 800) ** 2)],
    ],
)
def test_masks_follow_the_curriculum_that_was_asked_for(settings, alpha):
    inputs = inputs_of("semmae", images=3, shape=(7, 7), groups=5, epoch=399, **settings)
    order = inputs.uniform(PART_ORDER, 5)

    expected = semantic_scores(inputs.labels, inputs.noise, order, masked=inputs.masked, alpha=alpha)

    assert torch.equal(STRATEGIES["semmae"](inputs, 0.5), expected)


def test_alpha_goes_from_0_to_1_with_progress():
    assert [alpha_at(progress, MaskingConfig()) for progress in (0, 0.5, 1, 1.5)] == [0, 0.25, 1, 1]
    falling, cosine = MaskingConfig(curriculum="falling"), MaskingConfig(curriculum="cosine")
    assert [alpha_at(progress, falling) for progress in (0, 0.5, 1)] == [1, 0.25, 0]
    assert [alpha_at(progress, cosine) for progress in (0, 1 / 3, 1)] == pytest.approx([0, 0.25, 1])


def test_the_released_alpha_goes_by_the_epoch_of_800_whatever_the_run():
    released = MaskingConfig(curriculum="released")

    assert [alpha_at(0.9, released, epoch) for epoch in (0, 99, 799, 1000)] == [1 / 640_000, 0.015625, 1, 1]


@given(sizes=awkward_sizes, ratio=st.sampled_from([0.5, 0.6, 0.75, 0.9]), eighths=st.integers(0, 8), data=st.data())
def test_the_released_rounding_is_the_released_loops_patch_by_patch(sizes, ratio, eighths, data):
    labels = labels_of(sizes, data.draw(st.integers(0, 99)))
    order = data.draw(st.permutations(range(len(sizes))))
    noise = torch.tensor([data.draw(st.permutations(range(sum(sizes))))]) / 512

    scores = released_scores(labels, noise, noise_of(order), mask_ratio=ratio, alpha=eighths / 8)
    mask = lowest(scores, masked_count(sum(sizes), ratio))

    assert mask[0].tolist() == released_mask(labels[0].tolist(), noise[0].tolist(), list(order), ratio, eighths / 8)


def test_the_released_counts_miss_the_budget_where_the_exact_ones_do_not():
    """Method reference, section 4: 36.75 of 49 patches, cut to 36, for the first permutation at alpha 1."""
    sizes, order = [5, 0, 12, 9, 3, 20], [2, 5, 3, 0, 4, 1]
    labels, noise = labels_of(sizes), torch.rand(1, 49)

    scores = released_scores(labels, noise, noise_of(order), mask_ratio=0.75, alpha=1.0)

    assert masked_counts(scores < -48, labels, 6) == [0, 0, 12, 4, 0, 20]
    assert lowest(scores, 37).sum() == 37


def test_the_released_rounding_is_used_where_it_was_asked_for():
    inputs = inputs_of("semmae", images=3, shape=(7, 7), groups=5, rounding="released")
    order = inputs.uniform(PART_ORDER, 5)

    expected = released_scores(inputs.labels, inputs.noise, order, mask_ratio=0.75, alpha=0.25)

    assert torch.equal(STRATEGIES["semmae"](inputs, 0.5), expected)
