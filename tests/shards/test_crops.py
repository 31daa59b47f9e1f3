"""S6, S7: an image is cropped and mirrored together with its labels, by draws that belong to the sample alone."""

import functools
import io
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import write_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from shards import decode
from shards.batches import Batch
from shards.crops import crop_cells, crop_into, reranked, sample_boxes, sample_flips
from shards.decode import assert_decoders_agree, decode_jpeg_into, decode_mirrored_into
from shards.errors import ShardError
from shards.sample import LabelledImage
from shards.shard_set import ShardSet
from shards.stream import Stream

SIZE, GRID, GROUPS, COUNT = 128, 8, 12, 24
CELL = SIZE // GRID
PART_STEP, RANK_STEP = 20, 4
"""Grey levels from a label to the next in the images that are painted from parts, and from ranks."""
EDGE = 3
"""Pixels from an edge between cells within which bicubic resizing may mix both."""


def jpeg_of(grey: np.ndarray) -> bytes:
    """Cells of 16 px are on JPEG's blocks, chroma's too, so that a flat cell stays flat within a level or two."""
    pixels = np.repeat(np.repeat(grey, CELL, axis=0), CELL, axis=1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def painted(what: str, number: int) -> LabelledImage:
    """An image whose cells are grey by their part, or by their rank; its attention is the part's grey as well."""
    random = np.random.default_rng(number)
    parts = random.integers(0, GROUPS, (GRID, GRID)).astype(np.uint8)
    fgrank = random.permutation(GRID**2).astype(np.uint16).reshape(GRID, GRID)
    grey = PART_STEP * parts if what == "parts" else RANK_STEP * fgrank
    attn = np.stack([PART_STEP * parts, 255 - PART_STEP * parts])
    box = (0.0, 0.0, float(SIZE), float(SIZE))
    peaks = np.array([0.25, number / COUNT], np.float32)
    members = (parts, fgrank, SIZE, SIZE, box, attn, peaks)
    return LabelledImage(f"{number:08d}", f"{number}.jpg", -1, jpeg_of(grey), *members)


@pytest.fixture(scope="module", params=["parts", "ranks"])
def painted_from(request, tmp_path_factory):
    """What the images of a set are painted from, and the set."""
    folder = tmp_path_factory.mktemp("painted") / request.param
    info = {"grid": GRID, "groups": GROUPS, "size": SIZE, "classes": [], "heads": 2}
    write_samples(folder, (painted(request.param, n) for n in range(COUNT)), info, samples_per_shard=8)
    with ShardSet.open(folder) as shards:
        yield request.param, shards


@pytest.fixture(scope="module")
def of_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("of_parts") / "set"
    info = {"grid": GRID, "groups": GROUPS, "size": SIZE, "classes": [], "heads": 2}
    write_samples(folder, (painted("parts", n) for n in range(COUNT)), info, samples_per_shard=8)
    with ShardSet.open(folder) as shards:
        yield shards


def batches(shards: ShardSet, count: int, **options) -> list[Batch]:
    iterator = iter(Stream(shards, **{"batch_size": COUNT, "seed": 0, "prefetch": 0} | options))
    taken = list(islice(iterator, count))
    iterator.close()
    return taken


def grey_at_centres(images: np.ndarray) -> np.ndarray:
    """Grey level in the middle of each label cell: the mean of the four pixels that meet there."""
    middle = np.arange(GRID) * CELL + CELL // 2
    around = [images[:, middle + y][:, :, middle + x, 1] for y in (-1, 0) for x in (-1, 0)]
    return np.mean(around, axis=0)


def inside_a_cell(boxes: np.ndarray) -> np.ndarray:
    """Which cells of cropped images look into the inside of a cell of the source, clear of its edges."""
    clear = []
    for start, extent in ((boxes[:, 1], boxes[:, 3]), (boxes[:, 0], boxes[:, 2])):
        within = (start[:, None] + (np.arange(GRID) + 0.5) / GRID * extent[:, None]) % CELL
        clear.append((within > EDGE) & (within < CELL - EDGE))
    return clear[0][:, :, None] & clear[1][:, None, :]


def looked_at(batch: Batch, *, flip: bool, crop_scale: float) -> np.ndarray:
    """Cells whose middle shows one cell of the source alone."""
    clear = np.ones(batch.parts.shape, bool)
    if crop_scale < 1:
        clear = inside_a_cell(sample_boxes(0, batch.epochs, batch.indices, size=SIZE, scale=crop_scale))
    if flip:
        mirrored = sample_flips(0, batch.epochs, batch.indices)
        clear[mirrored] = clear[mirrored][..., ::-1]
    return clear


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop_scale", [1.0, 0.6, 0.2])
def test_s7_a_label_cell_covers_what_it_covered_before(flip, crop_scale, painted_from):
    """Parts against images painted from parts; ranks, which are made again, by their order in those of ranks."""
    what, shards = painted_from

    taken = batches(shards, 4, flip=flip, crop_scale=crop_scale, attention=True)

    seen = 0
    for batch in taken:
        grey = grey_at_centres(batch.images)
        clear = looked_at(batch, flip=flip, crop_scale=crop_scale)
        seen += clear.sum()
        if what == "parts":
            assert np.abs(grey - PART_STEP * batch.parts)[clear].max() < PART_STEP / 4
        else:
            for row in range(COUNT):
                stored = np.rint(grey[row][clear[row]] / RANK_STEP).astype(int)
                again = batch.fgrank[row][clear[row]].astype(int)
                order = np.argsort(again)
                assert (np.diff(stored[order]) >= 0).all()
        assert (np.sort(batch.fgrank.reshape(COUNT, -1)) == np.arange(GRID**2)).all()
        assert np.array_equal(batch.attn[:, 0], PART_STEP * batch.parts)
        assert np.array_equal(batch.attn[:, 1], 255 - PART_STEP * batch.parts)
        assert batch.attn_peak.tolist() == [[0.25, np.float32(index / COUNT)] for index in batch.indices]
    assert seen > 0.2 * len(taken) * COUNT * GRID**2


@pytest.mark.parametrize("crop_scale", [1.0, 0.2])
def test_s7_about_half_the_images_are_mirrored_and_each_by_its_draw(crop_scale, of_parts):
    """An image that the labels follow could still be mirrored always, or never."""
    (plain,), (mirrored,) = (batches(of_parts, 1, flip=flip, crop_scale=crop_scale) for flip in (False, True))

    flips = sample_flips(0, plain.epochs, plain.indices)

    assert 0.2 < flips.mean() < 0.8
    for name in ("parts", "fgrank"):
        one, other = getattr(plain, name).copy(), getattr(mirrored, name)
        one[flips] = one[flips][..., ::-1]
        assert np.array_equal(one, other)
    assert np.array_equal(plain.images[~flips], mirrored.images[~flips])
    difference = plain.images[flips][:, :, ::-1].astype(int) - mirrored.images[flips]
    assert np.abs(difference).max() <= (0 if crop_scale == 1 else 2)  # a resized image is rounded from the left


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    grid=st.integers(1, 28),
    box=st.tuples(st.integers(1, 224), st.integers(1, 224), st.floats(0, 1), st.floats(0, 1)),
)
def test_s7_ranks_of_a_crop_are_a_permutation_in_the_order_of_the_source(seed, grid, box):
    width, height, left, top = box
    x0, y0 = int(left * (224 - width)), int(top * (224 - height))
    ranks = np.random.default_rng(seed).permutation(grid**2).astype(np.uint16).reshape(grid, grid)

    cut = crop_cells(ranks, (x0, y0, width, height), size=224)
    again = reranked(cut)

    assert again.dtype == np.uint16
    assert np.array_equal(np.sort(again, axis=None), np.arange(grid**2))
    in_order = cut.reshape(-1)[np.argsort(again, axis=None)].astype(int)
    assert (np.diff(in_order) >= 0).all()


def test_s7_cells_of_one_source_cell_are_ranked_by_place():
    ranks = np.array([[2, 0], [1, 3]], np.uint16)

    cut = crop_cells(ranks, (0, 0, 1, 2), size=2)

    assert cut.tolist() == [[2, 2], [1, 1]]
    assert reranked(cut).tolist() == [[2, 3], [0, 1]]


@settings(deadline=None)
@given(box=st.tuples(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1)), grid=st.integers(1, 9))
def test_s7_a_cell_of_a_crop_is_the_source_cell_under_its_centre(box, grid):
    """Against whole numbers: twice the grid's and the crop's sides clear every fraction."""
    width, height, left, top = box
    x0, y0, size = int(left * (40 - width)), int(top * (40 - height)), 40
    cells = np.arange(grid**2).reshape(grid, grid)

    cut = crop_cells(cells, (x0, y0, width, height), size=size)

    for row, col in np.ndindex(grid, grid):
        above, over = (2 * grid * y0 + (2 * row + 1) * height) * grid, 2 * grid * size
        before = (2 * grid * x0 + (2 * col + 1) * width) * grid
        if above % over and before % over:  # a centre on the very edge may fall to either side
            assert cut[row, col] == cells[above // over, before // over]


def test_a_crop_of_everything_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    row = np.empty_like(pixels)

    crop_into(pixels, (0, 0, 40, 40), row)

    assert np.array_equal(row, pixels)


def fingerprints(taken: list[Batch]) -> dict[tuple[int, int], bytes]:
    """What the stream made of each (epoch, index)."""
    return {
        (int(batch.epochs[row]), int(batch.indices[row])): b"".join(
            getattr(batch, name)[row].tobytes() for name in ("images", "parts", "fgrank")
        )
        for batch in taken
        for row in range(len(batch.indices))
    }


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1},
        {"threads": 5},
        {"prefetch": 3},
        {"batch_size": 7},
        {"batch_size": 10, "position": 5},
        {"batch_size": 12, "rank": 1, "world_size": 3},
        {"window": 1},
    ],
    ids=str,
)
def test_s6_a_sample_is_altered_the_same_way_wherever_it_is_read(options, of_parts):
    meant = fingerprints(batches(of_parts, 3, flip=True, crop_scale=0.3))

    found = fingerprints(batches(of_parts, 3, flip=True, crop_scale=0.3, **options))

    assert len(found) >= 12
    assert all(meant[which] == found[which] for which in found)


def test_s6_epochs_and_seeds_draw_anew(of_parts):
    views = [fingerprints(batches(of_parts, 2, crop_scale=0.3, seed=seed)) for seed in (0, 1)]

    drawn = {views[seed][epoch, 3] for seed in (0, 1) for epoch in (0, 1)}

    assert len(drawn) == 4


@pytest.mark.parametrize("scale", [0.2, 0.5, 0.9])
def test_boxes_are_drawn_by_torchvisions_law(scale):
    count, size = 12_000, 224
    boxes = sample_boxes(1, np.zeros(count, np.int64), np.arange(count), size=size, scale=scale).astype(float)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.empty(3, size, size)
        theirs = np.array([RandomResizedCrop.get_params(image, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])

    for ours, other in zip(laws(boxes, size), laws(theirs[:, [1, 0, 3, 2]].astype(float), size), strict=True):
        assert np.abs(np.quantile(ours, DECILES) - np.quantile(other, DECILES)).max() < 0.03
        assert abs(ours.mean() - other.mean()) < 0.015


DECILES = np.arange(0.1, 1, 0.1)


def laws(boxes: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Area's share, log ratio, and where the box is in the room it has, of each box (x0, y0, width, height)."""
    x0, y0, width, height = boxes.T
    free_x, free_y = size - width > 8, size - height > 8
    return (
        width * height / size**2,
        np.log(width / height),
        (x0 / np.maximum(size - width, 1))[free_x],
        (y0 / np.maximum(size - height, 1))[free_y],
    )


@settings(deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(2, 256), scale=st.floats(0.01, 0.999), first=st.integers(0, 10**6))
def test_boxes_lie_inside_the_image_with_their_share_of_area_and_ratio(seed, size, scale, first):
    indices = np.arange(first, first + 50)

    boxes = sample_boxes(seed, np.zeros(50, np.int64), indices, size=size, scale=scale)

    x0, y0, width, height = boxes.T
    assert (np.minimum(x0, y0) >= 0).all()
    assert (np.minimum(width, height) > 0).all()
    assert (np.maximum(x0 + width, y0 + height) <= size).all()
    assert ((width + 0.5) * (height + 0.5) >= scale * size**2).all()
    assert ((width - 0.5) / (height + 0.5) <= 4 / 3).all()
    assert ((width + 0.5) / (height - 0.5) >= 3 / 4).all()


def noise_jpeg(height: int, width: int, subsampling: str = "4:2:0") -> bytes:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=subsampling)
    return buffer.getvalue()


def pixels_of(jpeg: bytes, height: int, width: int, *, mirrored: bool = False) -> np.ndarray:
    row, scratch = np.empty((2, height, width, 3), np.uint8)
    if mirrored:
        decode_mirrored_into(jpeg, row, scratch)
    else:
        decode_jpeg_into(jpeg, row)
    return row


SIDES = [(8, 8), (16, 24), (64, 64), (224, 224), (9, 8), (8, 9), (33, 7), (30, 36), (60, 1), (1, 64), (17, 223)]


@pytest.mark.parametrize(("height", "width"), SIDES)
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("installed", [True, False], ids=["simplejpeg", "pillow"])
def test_mirrored_decoding_is_decoding_mirrored(height, width, subsampling, installed, monkeypatch):
    monkeypatch.setattr(decode, "simplejpeg", simplejpeg if installed else None)
    jpeg = noise_jpeg(height, width, subsampling)

    mirrored = pixels_of(jpeg, height, width, mirrored=True)

    assert np.array_equal(mirrored, pixels_of(jpeg, height, width)[:, ::-1])


@pytest.mark.parametrize("width", [64, 60])
def test_mirrored_decoding_into_rows_that_are_not_contiguous(width):
    jpeg = noise_jpeg(32, width)
    room, scratch = np.zeros((32, 2 * width, 3), np.uint8), np.empty((32, width, 3), np.uint8)

    decode_mirrored_into(jpeg, room[:, :width], scratch)

    assert np.array_equal(room[:, :width], pixels_of(jpeg, 32, width)[:, ::-1])
    assert room[:, width:].max() == 0


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mirrored_image_of_another_size_is_refused(mirrored):
    with pytest.raises(ValueError, match="the image is 24x16, expected 16x16"):
        pixels_of(noise_jpeg(16, 24), 16, 16, mirrored=mirrored)


@pytest.mark.parametrize("shift", range(0, 64, 8))
def test_pixels_lie_where_the_decoder_does_not_store_past_the_cache(shift):
    memory = decode.memory_for(128, 4, 8, 3)[shift:]

    pixels = decode.pixels_in(memory, 4, 8, 3)

    assert pixels.shape == (4, 8, 3)
    assert pixels.ctypes.data % 32 == 16
    assert np.shares_memory(pixels, memory)


@pytest.mark.parametrize(("height", "width"), SIDES)
def test_simplejpeg_and_pillow_decode_to_the_same_bits(height, width, monkeypatch):
    jpeg = noise_jpeg(height, width)
    fast = pixels_of(jpeg, height, width)

    monkeypatch.setattr(decode, "simplejpeg", None)

    assert np.array_equal(pixels_of(jpeg, height, width), fast)


def test_a_stream_is_the_same_without_simplejpeg(of_parts, monkeypatch):
    fast = fingerprints(batches(of_parts, 1, flip=True, crop_scale=0.3))

    monkeypatch.setattr(decode, "simplejpeg", None)

    assert fingerprints(batches(of_parts, 1, flip=True, crop_scale=0.3)) == fast


@pytest.fixture
def asked_anew():
    """The answer is kept for the process; here it is asked for again, and not kept."""
    assert_decoders_agree.cache_clear()
    yield
    assert_decoders_agree.cache_clear()


def test_decoders_are_found_to_agree(asked_anew):
    assert_decoders_agree()


def test_a_decoder_that_differs_stops_the_stream_at_once(of_parts, asked_anew, monkeypatch):
    """simplejpeg's own faster transform, which is off by a few levels, stands in for another release."""
    coarse = SimpleNamespace(
        decode_jpeg_header=simplejpeg.decode_jpeg_header,
        decode_jpeg=functools.partial(simplejpeg.decode_jpeg, fastdct=True, fastupsample=True),
    )
    monkeypatch.setattr(decode, "simplejpeg", coarse)

    with pytest.raises(ShardError, match=r"decode the same JPEG to different pixels here; .* requirements\.lock"):
        Stream(of_parts, batch_size=4, seed=0)


def test_a_decoder_that_ignores_the_colour_order_stops_the_stream_too(asked_anew, monkeypatch):
    """Only mirrored decoding asks for BGR."""

    def always_rgb(jpeg, colorspace="RGB", buffer=None):
        return simplejpeg.decode_jpeg(jpeg, buffer=buffer)

    rgb = SimpleNamespace(decode_jpeg_header=simplejpeg.decode_jpeg_header, decode_jpeg=always_rgb)
    monkeypatch.setattr(decode, "simplejpeg", rgb)

    with pytest.raises(ShardError, match="different pixels"):
        assert_decoders_agree()
