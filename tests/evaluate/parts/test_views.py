"""Squares of images with known parts: where they lie, and that truth lies where the pixels do."""

import numpy as np
from PIL import Image

from evaluate.parts.views import TruthSet


def test_squares_lie_in_the_middle_or_at_one_end_and_the_other_with_their_truth(tmp_path):
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8), (20, 40))
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(2):
        Image.fromarray(np.ascontiguousarray(6 * ramp)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(1 + ramp // 5).save(tmp_path / f"labels/{number}.png")
    truths = TruthSet(tmp_path)

    middle, ends = truths.centre(size=20, grid=4), truths.ends(size=20, grid=4)

    assert middle.images[:, 10, :, 0].tolist() == [[6 * x for x in range(10, 30)]] * 2
    assert ends.images[:, 10, :, 0].tolist() == [[6 * x for x in range(20)], [6 * x for x in range(20, 40)]]
    assert middle.truth[:, 0].tolist() == [[3, 4, 5, 6]] * 2
    assert ends.truth[:, 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
