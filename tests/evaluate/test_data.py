"""Images become squares as the protocols say, and what cannot be read is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoders.load import load_encoder
from evaluate.config import KnnConfig
from evaluate.data import CENTRE_CROP, STORED, Split, centre_crop, load_split
from evaluate.features import extract_features, train_and_test
from shards import storage
from shards.decode import decode_rgb, square
from shards.images import list_images

TINY = "random:vit_tiny_patch16_224"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes, six images of 60 x 44 each."""
    for number in range(12):
        place = tmp_path / "photos" / ("red", "blue")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        noise(60, 44, number).save(place / f"{number:02d}.png")
    return tmp_path / "photos"


def pixels_of(split: Split, size: int) -> np.ndarray:
    return np.concatenate([batch.images for batch in split.batches(size=size, batch_size=5, threads=2)])


@settings(max_examples=25)
@given(width=st.integers(32, 500), height=st.integers(32, 500), seed=st.integers(0, 99))
def test_a_centre_crop_is_the_middle_224_of_a_short_side_of_256(width, height, seed):
    image = noise(width, height, seed)

    ours = centre_crop(image, 224)

    wide, high = (256, int(256 * height / width)) if width < height else (int(256 * width / height), 256)
    whole = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
    left, top = round((wide - 224) / 2), round((high - 224) / 2)
    assert np.array_equal(np.asarray(ours), whole[top : top + 224, left : left + 224])


@pytest.mark.parametrize(("size", "short"), [(64, 73), (96, 110), (384, 439)])
def test_other_sizes_show_the_same_seven_eighths(size, short):
    image = noise(120, 120)

    whole = np.asarray(image.resize((short, short), Image.Resampling.BICUBIC))
    first = round((short - size) / 2)
    assert np.array_equal(np.asarray(centre_crop(image, size)), whole[first : first + size, first : first + size])


@pytest.mark.parametrize("shape", [(200_000, 2), (2, 200_000)])
def test_a_strip_does_not_fill_the_memory(shape):
    strip = Image.new("RGB", shape, "red")
    strip.paste("blue", tuple(side // 2 + by for by in (-1, 1) for side in shape))

    shown = np.asarray(centre_crop(strip, 224))

    assert shown.shape == (224, 224, 3)
    assert shown[112, 112].tolist() == [0, 0, 255]


def test_files_are_cropped_and_shards_are_read_as_stored(photos, make_shards):
    shards, files = make_shards(count=20), list_images(photos).images

    alone, stored = load_split("", str(photos)), load_split(str(shards.path), "")

    assert [alone.preparation, stored.preparation] == [CENTRE_CROP, STORED]
    crops = [centre_crop(decode_rgb(Path(file.location).read_bytes()), 64) for file in files]
    assert np.array_equal(pixels_of(alone, 64), np.stack([np.asarray(crop) for crop in crops]))
    assert np.array_equal(pixels_of(stored, 64)[7], np.asarray(decode_rgb(shards.read(7).jpeg)))


@pytest.mark.parametrize("first", ["data", "val_data"])
def test_files_beside_a_set_are_cut_to_squares_like_its_own(first, photos, make_shards):
    data = make_shards(count=20, classes=2).path
    (photos / "red").rename(photos / "class0")
    (photos / "blue").rename(photos / "class1")
    other = "val_images" if first == "data" else "images"

    found = train_and_test(KnnConfig(encoder=TINY, size=48, device="cpu", **{first: str(data), other: str(photos)}))

    squares = [square(decode_rgb(Path(file.location).read_bytes()), 32)[0] for file in list_images(photos).images]
    encoder = load_encoder(TINY, size=48, precision="fp32")
    features = encoder(torch.from_numpy(np.stack([np.asarray(one) for one in squares]))).class_token
    assert found.preparation == STORED
    assert torch.allclose(found.test if first == "data" else found.train, features, atol=1e-5)


def test_what_cannot_be_read_is_left_out_by_name_and_makes_another_fingerprint(photos, capsys):
    split = load_split("", str(photos))
    whole = split.fingerprint
    (photos / "red" / "00.png").write_bytes(b"no image")
    (photos / "blue" / "05.png").unlink()
    encoder = load_encoder(TINY, size=32)

    features, class_ids = extract_features(encoder, split, batch_size=5)

    assert features.shape == (10, 192)
    assert class_ids.tolist() == [0] * 5 + [1] * 5
    said = capsys.readouterr().err
    assert "2 of 12 images in" in said
    assert "the first is blue/05.png (" in said
    assert list(split.unreadable) == ["blue/05.png", "red/00.png"]
    assert split.fingerprint != whole
    torn = split.fingerprint
    noise(60, 44).save(photos / "red" / "00.png")
    extract_features(encoder, split)
    assert split.fingerprint not in (whole, torn)


def test_a_folder_that_vanishes_is_the_storages_fault_and_no_few_images(photos):
    split = load_split("", str(photos))
    (photos / "red").rename(photos.parent / "elsewhere")

    with pytest.raises(OSError, match=r"red/00\.png cannot be read \(.*\); check the storage, then run again"):
        pixels_of(split, 32)


def test_more_files_than_a_few_out_of_reach_are_an_outage(tmp_path):
    for number in range(24):
        (tmp_path / f"class{number % 2}").mkdir(exist_ok=True)
        noise(8, 8, number).save(tmp_path / f"class{number % 2}" / f"{number:02d}.png")
    split = load_split("", str(tmp_path))
    for number in range(11):
        (tmp_path / f"class{number % 2}" / f"{number:02d}.png").unlink()

    with pytest.raises(OSError, match=r"11 of 24 images in .* are out of reach, the first class0/00\.png \("):
        pixels_of(split, 8)
    noise(8, 8).save(tmp_path / "class0" / "00.png")
    assert len(pixels_of(split, 8)) == 14


def test_an_object_that_vanishes_is_left_out_and_a_store_that_does_not_answer_stops_the_run(photos, s3, monkeypatch):
    for path in sorted(photos.rglob("0[0-3].png")):
        with s3.open_output_stream(f"images/set/{path.parent.name}/{path.name}") as stream:
            stream.write(path.read_bytes())
    split = load_split("", "s3://images/set")
    s3.delete_file("images/set/red/00.png")

    assert len(pixels_of(split, 32)) == 3
    assert list(split.unreadable) == ["red/00.png"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage._store.cache_clear()
    with pytest.raises(OSError, match=r"\.png cannot be read \(.*\); check the storage, then run again"):
        pixels_of(split, 32)


def test_an_image_without_a_class_is_told_and_left_out_as_long_as_two_classes_remain(tmp_path, capsys):
    for name in ("cat/1.png", "dog/2.png", "montage.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 7)).save(path)

    split = load_split("", str(tmp_path))
    class_ids = [label for batch in split.batches(size=8, batch_size=2, threads=1) for label in batch.class_ids]

    assert (len(split), class_ids) == (2, [0, 1])
    assert "1 of 3 images" in capsys.readouterr().err
