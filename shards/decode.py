"""Stored bytes to pixels.

The stream decodes JPEGs of its own in place, mirrored where asked: simplejpeg releases the GIL; Pillow stands in, bit
for bit. Extraction and evaluation decode whatever people have, with Pillow, and cut it square.
"""

import functools
import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, SupportsInt, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.errors import ShardError
from shards.formats import FIRST_BYTES, FORMATS, is_heif

Box = tuple[float, float, float, float]

try:
    import simplejpeg
except ImportError:  # a machine with its own stack: Pillow decodes to the same bits, at two thirds of the speed
    simplejpeg = None

MOST_PIXELS, LARGE = 512_000_000, 64_000_000
"""Pixels of the largest image that is decoded, and of the largest that is decoded beside others."""
_one_large = threading.Lock()

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
    """Decode one image both ways, once a process: training must not depend on which decoder is installed.

    Raises:
        ShardError: simplejpeg and Pillow give different pixels, or the mirrored decoding another image.
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
        raise ValueError(f"the image is {found[1]}x{found[0]}, expected {row.shape[1]}x{row.shape[0]}")


class ImageError(ValueError):
    """An image that cannot be read or decoded (`step`); the message is the reason."""

    def __init__(self, reason: str, *, step: str = "decode"):
        super().__init__(reason)
        self.step = step


class Decoded(NamedTuple):
    """A square of an image: its pixels, the box they were cut from, and width and height of the whole."""

    image: Image.Image
    box: Box
    source_size: tuple[int, int]


def decode_rgb(data: bytes) -> Image.Image:
    """RGB pixels, upright, whatever was stored: CMYK, grey, palette; 16 bits are scaled, alpha is over white.

    Raises:
        ImageError: The bytes are no whole image, or of more than 512 megapixels; of the same bytes, always in the same
            words.
    """
    return decode_with(data, lambda image: image)


def decode_square(data: bytes, size: int, *, offset: float = 0.5) -> Decoded:
    """The `square` of what `decode_rgb` gives, as `decode_with`.

    Raises:
        ImageError: As `decode_rgb`.
    """
    return decode_with(data, lambda image: Decoded(*square(image, size, offset=offset), image.size))


T = TypeVar("T")


def decode_with(data: bytes, use: Callable[[Image.Image], T]) -> T:
    """What `use` makes of the pixels that `decode_rgb` gives; of images of more than 64 megapixels, one at a time is in
    memory until it has.

    Raises:
        ImageError: As `decode_rgb`.
    """
    if not data:
        raise ImageError("empty file")
    try:
        with (
            _quiet_pillow(),
            Image.open(io.BytesIO(data), formats=_formats()) as image,
            _one_large if image.width * image.height > LARGE else nullcontext(),
        ):
            image.load()
            return use(_as_rgb(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError as error:  # Pillow names the buffer by its address
        if is_heif(data[:FIRST_BYTES]):
            raise ImageError("a HEIC image, which is read where pillow-heif is installed") from error
        raise ImageError("not an image that Pillow knows (JPEG, PNG, WebP, ...)") from error
    except MemoryError:  # this machine's, and no property of the image
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for broken files; each is this image's reason
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads, in its own order."""
    Image.init()
    return tuple(name for name in Image.ID if name in FORMATS)


def square(image: Image.Image, size: int, *, offset: float = 0.5) -> tuple[Image.Image, Box]:
    """The square of the short side, at `offset` (0 to 1) along the long side, resized to `size`; and its box in
    source pixels (x0, y0, x1, y1). Bicubic, antialiased."""
    width, height = image.size
    side = min(width, height)
    x0, y0 = round((width - side) * offset), round((height - side) * offset)
    box = (float(x0), float(y0), float(x0 + side), float(y0 + side))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box), box


_decoding, _decoding_lock, _filters = 0, threading.Lock(), warnings.catch_warnings()
_pillows_limit = Image.MAX_IMAGE_PIXELS


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow's warnings are silent, but for a decompression bomb, which is an error, from MOST_PIXELS on.

    Filters and limit belong to the process: were each thread to put back the ones it found, the last would put back
    another thread's. So the first one in sets them, and the last one out restores them.
    """
    global _decoding, _filters, _pillows_limit
    with _decoding_lock:
        if not _decoding:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            _pillows_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MOST_PIXELS
        _decoding += 1
    try:
        yield
    finally:
        with _decoding_lock:
            _decoding -= 1
            if not _decoding:
                Image.MAX_IMAGE_PIXELS = _pillows_limit
                _filters.__exit__(None, None, None)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        image = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
