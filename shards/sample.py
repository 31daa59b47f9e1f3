"""One sample: an image with its labels, and the bytes of its members."""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8, UInt16

from shards.decode import Box
from shards.errors import ShardError

MAGIC, HEADER = b"\x93NUMPY\x01\x00", 128


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """What a shard stores of one image."""

    key: str
    """Eight digits: the place in the seeded order of inputs."""
    source: str
    class_id: int
    """-1 without classes."""
    jpeg: bytes
    """Empty in a label set, whose images are another set's."""
    parts: UInt8[np.ndarray, "rows cols"]
    fgrank: UInt16[np.ndarray, "rows cols"]
    """A permutation; 0 = most likely foreground."""
    src_width: int
    src_height: int
    box: Box
    """The crop in source pixels: x0, y0, x1, y1."""
    attn: UInt8[np.ndarray, "heads rows cols"] | None = None
    """Class attention of each head, 255 = its most attended cell."""
    attn_peak: Float32[np.ndarray, " heads"] | None = None
    """What each head attends to its most attended cell, as a share of all the class token attends to."""
    confidence: int = 255
    """That there is an object, in hundredths from 0 to 200; 255 = nobody asked."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """An input that is in no shard, and why."""

    source: str
    ordinal: int
    step: str
    reason: str


class Sample(NamedTuple):
    """What a shard gives back."""

    index: int
    key: str
    jpeg: bytes
    parts: np.ndarray
    """uint8 [rows, cols]"""
    fgrank: np.ndarray
    """uint16 [rows, cols]"""
    class_id: int
    attn: np.ndarray | None
    """uint8 [heads, rows, cols], where it was asked for"""
    attn_peak: np.ndarray | None
    """float32 [heads], where it was asked for and is stored"""


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as .npy version 1.0, little-endian, C order, behind a header of exactly 128 bytes."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return npy_header(little.dtype, little.shape) + little.tobytes()


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The only header our members have, so that reading compares bytes instead of parsing."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    return MAGIC + struct.pack("<H", HEADER - 10) + text.ljust(HEADER - 11).encode() + b"\n"


def attention_of(
    attn: UInt8[np.ndarray, "*batch heads rows cols"], peaks: Float32[np.ndarray, "*batch heads"]
) -> Float32[np.ndarray, "*batch heads rows cols"]:
    """The encoder's class attention, from its bytes and its heads' peaks, to half a 255th of the peak:
    byte · peak / 255. Heads can be compared, and their mean is the encoder's."""
    return attn * (peaks / np.float32(255))[..., None, None]


def check_attention(attn: np.ndarray, peaks: np.ndarray, *, name: str) -> None:
    """Every head's peak is a share, and its most attended cell has all of it; ShardError naming `name` otherwise."""
    if not ((peaks >= 0) & (peaks <= 1)).all():
        raise ShardError(f"{name} has a head whose attention peaks at {peaks}, expected shares between 0 and 1")
    if (attn.max(axis=(1, 2)) != np.where(peaks > 0, 255, 0)).any():
        raise ShardError(f"{name} has a head whose most attended cell is not the 255 that its peak stands for")


def check_labels(parts: np.ndarray, fgrank: np.ndarray, *, groups: int, name: str) -> None:
    """Labels lie below `groups`, ranks are a permutation; ShardError naming `name` otherwise."""
    if (parts.dtype, fgrank.dtype) != (np.uint8, np.uint16) or parts.shape != fgrank.shape:
        raise ShardError(
            f"{name} has {parts.dtype} labels {parts.shape} and {fgrank.dtype} ranks {fgrank.shape}, "
            "expected uint8 and uint16 of one shape"
        )
    if parts.max() >= groups:
        raise ShardError(f"{name} has the part label {parts.max()}, expected labels below {groups}")
    if not np.array_equal(np.sort(fgrank, axis=None), np.arange(fgrank.size)):
        raise ShardError(f"the foreground ranks of {name} are no permutation of 0 to {fgrank.size - 1}")
