"""JPEG bytes to pixels in place, mirrored where asked. simplejpeg releases the GIL; Pillow stands in, bit for bit."""

import functools
import io
import math
from collections.abc import Sequence
from typing import SupportsInt

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from shards.errors import ShardError

try:
    import simplejpeg
except ImportError:  # a machine with its own stack: Pillow decodes to the same bits, at two thirds of the speed
    simplejpeg = None

WIDEST = 32
"""Bytes of the widest register that the decoder stores from."""


def memory_for(*shape: int) -> UInt8[np.ndarray, " bytes"]:
    """Memory, not yet written, in which `pixels_in` finds room for pixels of `shape`."""
    return np.empty(math.prod(shape) + WIDEST, np.uint8)


def pixels_in(memory: UInt8[np.ndarray, " bytes"], *shape: int) -> UInt8[np.ndarray, "..."]:
    """The array of `shape` in `memory` that begins half a register after a multiple of one.

    Into rows that begin at a multiple, libjpeg-turbo stores past the cache, and reading them back, as mirroring does,
    costs 50 microseconds at 224 px. Where the allocator puts a buffer differs from call to call.
    """
    first = (WIDEST // 2 - memory.ctypes.data) % WIDEST
    return memory[first : first + math.prod(shape)].reshape(shape)


def decode_jpeg_into(jpeg: bytes, row: UInt8[np.ndarray, "height width 3"]) -> None:
    """Decode a JPEG into `row`.

    Raises:
        ValueError: It is broken, or of another size.
    """
    if simplejpeg is None:
        pixels = _by_pillow(jpeg)
        _check_size(pixels.shape[:2], row)
        row[:] = pixels
    else:
        _check_size(simplejpeg.decode_jpeg_header(jpeg)[:2], row)
        simplejpeg.decode_jpeg(jpeg, buffer=row)


def decode_mirrored_into(
    jpeg: bytes, row: UInt8[np.ndarray, "height width 3"], scratch: UInt8[np.ndarray, "height width 3"]
) -> None:
    """Decode a JPEG into `row`, left and right exchanged; `scratch` is written over.

    The bytes of a row of BGR pixels, read backwards, are the mirrored row in RGB. Taken eight at a time that costs
    4 microseconds at 224 px; NumPy's own reversed copy, three bytes at a time, costs 150.
    """
    height, width, _ = row.shape
    if simplejpeg is None or width % 8 or not row.flags.c_contiguous:
        decode_jpeg_into(jpeg, scratch)
        row[:] = scratch[:, ::-1]
        return
    _check_size(simplejpeg.decode_jpeg_header(jpeg)[:2], row)
    simplejpeg.decode_jpeg(jpeg, colorspace="BGR", buffer=scratch)
    backwards = scratch.reshape(height, 3 * width).view(">u8")[:, ::-1]
    row.reshape(height, 3 * width).view("<u8")[...] = backwards


@functools.cache
def assert_decoders_agree() -> None:
    """Decode one picture both ways, once a process: training must not depend on which decoder is installed.

    Raises:
        ShardError: simplejpeg and Pillow give different pixels, or the mirrored decoding another picture.
    """
    y, x = np.mgrid[:64, :64]
    drawn = np.stack([4 * x, 4 * y, (x * y) % 256], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    plain, mirrored, scratch = (np.empty_like(drawn) for _ in range(3))
    decode_jpeg_into(buffer.getvalue(), plain)
    decode_mirrored_into(buffer.getvalue(), mirrored, scratch)
    if not (np.array_equal(plain, _by_pillow(buffer.getvalue())) and np.array_equal(mirrored, plain[:, ::-1])):
        raise ShardError(
            "simplejpeg and Pillow decode the same JPEG to different pixels here; install the releases that "
            "requirements.lock names, or uninstall simplejpeg"
        )


def _by_pillow(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def _check_size(found: Sequence[SupportsInt], row: np.ndarray) -> None:
    if tuple(found) != row.shape[:2]:
        raise ValueError(f"the picture is {found[1]}x{found[0]}, expected {row.shape[1]}x{row.shape[0]}")
