"""What odd pixels become: 16 bits over the whole range of 8, alpha over white."""

import io

import numpy as np
import pytest
from PIL import Image

from shards.decode import decode_rgb


@pytest.mark.parametrize(("stored", "seen"), [(0, 0), (257, 1), (32_896, 128), (65_535, 255)])
def test_16_bits_are_scaled_to_8(stored, seen):
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), stored, np.uint16)).save(buffer, "PNG")

    assert decode_rgb(buffer.getvalue()).getpixel((0, 0)) == (seen,) * 3


def test_what_is_transparent_is_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 200, 0)).save(buffer, "PNG")

    assert decode_rgb(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
