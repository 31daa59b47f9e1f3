"""Equal attention is told apart by noise of the image's own, so that no place in an image is preferred."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle

from encoders.frozen import Tokens
from partlearn.foreground import falling, foreground_rank, foreground_score, object_cells, tie_noise, ties_of
from partlearn.labelling.baselines import Baseline, greatest
from partlearn.learner import LearnerShape, PartLearner
from shards import rng

IMAGES, CELLS, HEADS, DIM = 400, 16**2, 4, 8
LEARNER = LearnerShape(
    dim=DIM, width=DIM, heads=HEADS, grid=16, parts=3, background=True, foreground="attention", foreground_share=0.25,
    where="foreground", relative=False, from_class=False, whitened=False, unit=False, diffusion=0, softmax="parts",
    target="features", decoder_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def flat() -> Tokens:
    """Images whose every head attends alike to every cell."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(IMAGES, 1 + CELLS, DIM, generator=generator)
    attention = torch.full((IMAGES, HEADS, CELLS), 1 / (1 + CELLS))
    return Tokens(tokens[:, 0], tokens[:, 1:], tokens, attention)


def even(share: torch.Tensor, expected: float, deviation: float, draws: int = IMAGES) -> bool:
    """Whether the mean over `draws` lies within five standard errors of what is expected, everywhere."""
    return bool(((share - expected).abs() < 5 * deviation / draws**0.5).all())


def of_baseline(name: str, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    return Baseline(name, Oracle(), parts=6, foreground="attention").label(tokens)


def of_learner(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    return PartLearner(LEARNER).label(tokens)


@pytest.mark.parametrize("label", [of_learner, lambda tokens: of_baseline("heads", tokens)], ids=["learner", "heads"])
def test_a_flat_map_ranks_no_place_before_another(label, flat):
    parts, rank = label(flat)

    assert torch.equal(rank.sort(dim=1).values, torch.arange(CELLS).expand(IMAGES, -1))
    assert even(rank.float().mean(dim=0), (CELLS - 1) / 2, CELLS / 12**0.5)
    inside = (parts < parts.max()).float()
    taken = inside[0].mean().item()
    assert even(inside.mean(dim=0), taken, (taken * (1 - taken)) ** 0.5)


def test_of_equal_heads_each_is_as_likely_in_every_place(flat):
    for name in ("heads", "heads-mass"):
        parts, _ = of_baseline(name, flat)
        inside = parts < HEADS
        for head in range(HEADS):
            here = (parts == head).sum(dim=0) / inside.sum(dim=0)
            assert even(here, 1 / HEADS, (3 / 16) ** 0.5, int(inside.sum(dim=0).min()))


def test_heads_by_mass_of_flat_heads_keep_no_place_before_another(flat):
    parts, _ = of_baseline("heads-mass", flat)

    alone = 0.4**HEADS
    assert even((parts == HEADS).float().mean(dim=0), alone, (alone * (1 - alone)) ** 0.5)


def test_the_learner_learns_where_it_labels(flat):
    learner = PartLearner(LEARNER)

    assert torch.equal(learner.learned_cells(flat), learner.label(flat)[0] < LEARNER.parts)


def test_the_noise_is_an_images_own_in_any_batch_and_of_its_own_purpose(flat):
    noise = tie_noise(flat, 5)

    alone = Tokens(*(getattr(flat, name)[7:8] for name in Tokens.__dataclass_fields__))
    assert torch.equal(tie_noise(alone, 5), noise[7:8])
    assert len(noise.unique()) > 0.99 * noise.numel()
    assert [*range(8)] == [rng.ORDER, rng.FLIP, rng.CROP, rng.MASK, rng.PART_ORDER, rng.VIEW, rng.SHARDS, rng.TIES]


@pytest.mark.parametrize("scorer", ["contrast", "border", "maps"])
def test_other_scores_are_ranked_without_noise(scorer, flat):
    assert ties_of(flat, scorer) is None


@given(seed=st.integers(0, 99), levels=st.integers(1, 5))
def test_the_order_is_that_of_values_then_noise(seed, levels):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, levels, (2, 16), generator=generator).float()
    noise = torch.rand(2, 16, generator=generator)

    order, rank = falling(values, noise), foreground_rank(values, noise)

    for row in range(2):
        expected = sorted(range(16), key=lambda at: (-values[row, at].item(), noise[row, at].item()))
        assert order[row].tolist() == expected
        assert [rank[row, at].item() for at in expected] == list(range(16))
        best = object_cells(values, 0.25, noise)[row]
        assert best.nonzero().squeeze(1).tolist() == sorted(expected[:4])


def test_noise_decides_between_equals_alone(flat):
    attention = torch.tensor([[[0.3, 0.2, 0.1], [0.3, 0.1, 0.1], [0.1, 0.1, 0.2]]])
    noise = torch.tensor([[[0.1, 0.0, 0.5], [0.2, 0.8, 0.9], [0.9, 0.9, 0.1]]])

    assert greatest(attention, noise).tolist() == [[1, 0, 2]]
    assert foreground_score(flat, "attention").unique().numel() == 1
