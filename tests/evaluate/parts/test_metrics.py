"""Scores of part maps: against slow twins, by hand, and by what must not change them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.clustering import pair_ari, stepwise_ap, summed_nmi

from evaluate.parts.metrics import (
    areas,
    ari,
    average_precision,
    beyond_shortcut,
    flip_agreement,
    flip_inside,
    foreground_cells,
    largest_share,
    nmi,
    parts_used,
    recall_in_quarter,
    score,
    shortcuts,
    speckle,
    speckle_inside,
)
from evaluate.parts.shortcuts import bands, border_distance_rgb, cell_colours, centre_prior, colour_clusters, darkness
from partlearn.health import speckle as health_speckle

labellings = st.integers(2, 24).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2))


@given(pair=labellings)
def test_nmi_and_ari_are_those_of_the_slow_twins(pair):
    labels, truth = np.array(pair[0]), np.array(pair[1])

    assert nmi(labels, truth) == pytest.approx(summed_nmi(*pair), abs=1e-9)
    assert ari(labels, truth) == pytest.approx(pair_ari(*pair), abs=1e-9)


@given(pair=labellings, seed=st.integers(0, 99))
def test_names_and_order_of_the_labels_do_not_matter(pair, seed):
    labels, truth = np.array(pair[0]), np.array(pair[1])
    random = np.random.default_rng(seed)
    renamed, order = random.permutation(5)[labels], random.permutation(len(labels))

    for measure in (nmi, ari):
        assert measure(renamed, truth) == pytest.approx(measure(labels, truth), abs=1e-9)
        assert measure(labels[order], truth[order]) == pytest.approx(measure(labels, truth), abs=1e-9)
        assert measure(truth, labels) == pytest.approx(measure(labels, truth), abs=1e-9)
        assert measure(labels, renamed) == pytest.approx(1)


def test_independent_labels_agree_by_nothing():
    random = np.random.default_rng(0)
    labels, truth = random.integers(0, 6, 20_000), random.integers(0, 5, 20_000)

    assert nmi(labels, truth) < 0.002
    assert abs(ari(labels, truth)) < 0.002


def test_agreement_of_four_cells_by_hand():
    labels, truth = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])

    # I = H(labels) = ln 2, H(truth) = 1.5 ln 2
    assert nmi(labels, truth) == pytest.approx(0.8)
    # 1 pair together in both, 2 and 1 pairs in each, 6 in all: (1 - 1/3) / (3/2 - 1/3)
    assert ari(labels, truth) == pytest.approx(4 / 7)


@given(cells=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_average_precision_is_that_of_the_slow_twin(cells):
    scores, truth = np.array([float(s) for s, _ in cells]), np.array([t for _, t in cells])

    found = average_precision(scores, truth)

    assert found == (pytest.approx(stepwise_ap(scores.tolist(), truth.tolist())) if truth.any() else None)


def test_average_precision_by_hand():
    scores, truth = np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False])

    assert average_precision(scores, truth) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert average_precision(np.zeros(4), truth) == pytest.approx(1 / 2)


def test_recall_counts_true_cells_in_the_best_quarter():
    rank, truth = np.array([0, 1, 2, 3, 4, 5, 6, 7]), np.array([1, 0, 1, 0, 0, 0, 0, 1], dtype=bool)

    assert recall_in_quarter(rank, truth) == pytest.approx(1 / 3)
    assert recall_in_quarter(rank, np.zeros(8, dtype=bool)) is None


def test_speckle_counts_cells_alone_among_their_neighbours():
    one_alone = np.zeros((1, 3, 3), dtype=np.uint8)
    one_alone[0, 1, 1] = 1
    board = np.indices((4, 4)).sum(axis=0)[None] % 2

    assert speckle(one_alone) == pytest.approx(1 / 9)
    assert speckle(board) == 1
    assert speckle(np.zeros((2, 3, 3), dtype=np.uint8)) == 0


def test_speckle_inside_does_not_count_the_background():
    """Of four cells with a part, 2 and 3 stand alone; a background cell between them does not count, alone or not."""
    parts = np.array([[[1, 1, 0], [0, 0, 2], [3, 0, 0]]], dtype=np.uint8)

    assert speckle(parts) == pytest.approx(3 / 9)
    assert speckle_inside(parts) == pytest.approx(2 / 4)
    assert speckle_inside(np.zeros((1, 3, 3), dtype=np.uint8)) is None


@given(seed=st.integers(0, 99))
def test_speckle_means_here_what_it_means_while_learning(seed):
    parts = np.random.default_rng(seed).integers(0, 4, (3, 5, 5))
    labels = torch.from_numpy(parts.reshape(3, -1))

    assert speckle_inside(parts) == pytest.approx(health_speckle(labels, labels > 0))
    assert speckle(parts) == pytest.approx(health_speckle(labels, torch.ones_like(labels, dtype=torch.bool)))


def test_the_background_is_no_part():
    parts = np.array([[[0, 0], [0, 0]], [[1, 1], [0, 2]]], dtype=np.uint8)

    assert parts_used(parts) == 1
    assert largest_share(parts) == pytest.approx(2 / 3)
    assert largest_share(parts[:1]) is None


def test_areas_are_shares_of_the_cells_that_have_a_part():
    parts = np.array([[[0, 0], [0, 3]], [[1, 1], [0, 1]]], dtype=np.uint8)

    assert areas(parts, 4) == [3 / 4, 0, 1 / 4]
    assert areas(np.zeros((1, 2, 2), dtype=np.uint8), 4) is None


def test_mirrored_labels_of_the_mirror_image_agree_fully():
    parts = np.random.default_rng(0).integers(0, 5, (2, 6, 6))

    assert flip_agreement(parts, parts[:, :, ::-1]) == 1
    assert flip_agreement(parts, parts) < 1


def test_flip_inside_counts_cells_that_have_a_part_in_either_view():
    """Mirrored back, the second view is [0, 1, 0, 3], so that two cells of three with a part are named otherwise."""
    parts = np.array([[[0, 1, 2, 0]]], dtype=np.uint8)
    of_mirrored = np.array([[[3, 0, 1, 0]]], dtype=np.uint8)

    assert flip_agreement(parts, of_mirrored) == 2 / 4
    assert flip_inside(parts, of_mirrored) == pytest.approx(1 / 3)
    assert flip_inside(parts, parts[:, :, ::-1]) == 1
    assert flip_inside(np.zeros_like(parts), np.zeros_like(parts)) is None


def test_the_foreground_is_neither_background_nor_unknown():
    assert foreground_cells(np.array([[0, 1], [255, 9]])).tolist() == [[False, True], [False, True]]


@given(side=st.integers(4, 15), seed=st.integers(0, 9))
def test_cell_colours_are_means_of_the_cells_pixels(side, seed):
    images = np.random.default_rng(seed).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    row_of = np.arange(side) * 4 // side

    colours = cell_colours(images, 4)

    slow = [[images[1][row_of == r][:, row_of == c].mean(axis=(0, 1)) / 255 for c in range(4)] for r in range(4)]
    assert np.allclose(colours[1], slow)


def test_controls_know_height_centre_and_colour():
    images = np.full((1, 16, 16, 3), 200, dtype=np.uint8)
    images[0, 4:8, 4:8] = 20

    assert bands(6, 3)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert centre_prior(5).argmax() == 12
    for values in (darkness(images, 4)[0], border_distance_rgb(images, 4)[0]):
        assert np.unravel_index(values.argmax(), (4, 4)) == (1, 1)
    clusters = colour_clusters(images, 4, 2)[0]
    assert (clusters == clusters[1, 1]).sum() == 1


def test_the_score_beyond_shortcuts_is_nothing_for_shortcuts_and_all_for_the_truth():
    random = np.random.default_rng(0)
    truth, strata = random.integers(0, 4, 5000), random.integers(0, 6, 5000)

    assert beyond_shortcut(strata, truth, strata) == pytest.approx(0, abs=1e-9)
    assert beyond_shortcut(random.integers(0, 4, 5000), truth, strata) == pytest.approx(0, abs=0.01)
    assert beyond_shortcut(truth, truth, strata) == pytest.approx(1, abs=0.01)
    assert beyond_shortcut(truth, strata, strata) is None


def test_perfect_labels_score_one_and_the_columns_are_the_interfaces():
    random = np.random.default_rng(0)
    truth = np.zeros((6, 8, 8), dtype=np.int64)
    truth[:, 2:6, 2:6] = random.integers(1, 4, (6, 4, 4))
    images = random.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    order = np.argsort((truth == 0).reshape(6, -1), axis=1, kind="stable")
    fgrank = np.argsort(order, axis=1).reshape(6, 8, 8).astype(np.uint16)

    columns = score(truth.astype(np.uint8), fgrank, truth, images, groups=4)
    controls = shortcuts(truth, images, groups=4)

    ranked = ["foreground_ap", "foreground_recall_quarter", "foreground_iou_best", "foreground_iou_quarter"]
    agreeing = ["nmi", "ari", "nmi_image", "ari_image"]
    assert set(columns) == {
        *ranked,
        *agreeing,
        "colour_nmi",
        "bands_nmi",
        "beyond_shortcut",
        "beyond_other",
        "parts_used",
        "largest_share",
        "speckle",
        "speckle_inside",
    }
    for name in (*ranked, *agreeing):
        assert columns[name] == pytest.approx(1)
    assert columns["parts_used"] == 3
    assert all(set(row) == set(columns) for row in controls.values())
    assert controls["bands"]["nmi"] < 0.2
    assert controls["centre"]["foreground_ap"] == pytest.approx(1, abs=0.1)
    assert controls["centre"]["nmi"] is None


def test_unknown_cells_and_single_part_truth_are_left_out():
    truth = np.zeros((2, 4, 4), dtype=np.int64)
    truth[:, 0], truth[:, 1] = 1, 255
    fgrank = np.tile(np.arange(16, dtype=np.uint16).reshape(4, 4), (2, 1, 1))
    fgrank[:, [0, 1]] = fgrank[:, [1, 0]]
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)

    columns = score(np.ones((2, 4, 4), dtype=np.uint8), fgrank, truth, images, groups=2)

    assert columns["foreground_ap"] == columns["foreground_iou_best"] == 1
    assert columns["foreground_iou_quarter"] == 0
    assert columns["nmi"] is None
    assert columns["beyond_shortcut"] is None


def test_a_label_beyond_the_groups_is_refused():
    cells = np.full((1, 4, 4), 3, dtype=np.uint8)
    images = np.zeros((1, 8, 8, 3), dtype=np.uint8)

    with pytest.raises(ValueError, match="below 3"):
        score(cells, cells, cells, images, groups=3)
