"""Whatever is in people's folders: read, or listed with the reason."""

import io
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from shards import decode
from shards.decode import ImageError, _quiet_pillow, decode_rgb, square
from shards.images import list_images, read_bytes


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (12, 8), (200, 30, 30))


@pytest.mark.parametrize(
    "data",
    [
        saved(RED, "PNG"),
        saved(RED.convert("CMYK"), "JPEG", quality=95),
        saved(RED.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        saved(RED.convert("RGBA"), "PNG"),
        saved(RED, "WEBP", lossless=True),
    ],
    ids=["png", "cmyk", "palette", "alpha", "webp"],
)
def test_every_kind_becomes_rgb(data):
    image = decode_rgb(data)

    assert (image.mode, image.size) == ("RGB", (12, 8))
    assert np.abs(np.asarray(image, int) - [200, 30, 30]).max() < 12


def test_grey_and_16_bits_are_scaled_not_clipped():
    grey = decode_rgb(saved(Image.new("L", (4, 4), 90), "PNG"))
    deep = decode_rgb(saved(Image.fromarray(np.full((4, 4), 90 * 257, np.uint16)), "PNG"))

    assert np.asarray(grey).tolist() == np.full((4, 4, 3), 90).tolist()
    assert np.asarray(deep).tolist() == np.full((4, 4, 3), 90).tolist()


def test_transparent_pixels_lie_over_white():
    assert decode_rgb(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_images_come_upright():
    exif = Image.Exif()
    exif[0x0112] = 6

    assert decode_rgb(saved(RED, "JPEG", exif=exif)).size == (8, 12)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", r"not an image that Pillow knows \(JPEG, PNG, WebP, \.\.\.\)"),
        (saved(RED, "JPEG")[:200], ".*[Tt]runcated.*"),
        (saved(RED, "PNG")[:45], "image file is truncated"),
    ],
    ids=["empty", "text", "jpeg", "png"],
)
def test_what_is_no_whole_image_has_a_reason_that_is_always_the_same(data, reason):
    with pytest.raises(ImageError, match=f"^{reason}$"):
        decode_rgb(data)


def test_a_broken_exif_does_not_matter():
    data = saved(RED, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x40\x01\x12")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        image = decode_rgb(data)

    assert (image.size, told) == ((12, 8), [])


def test_a_decompression_bomb_is_no_image(monkeypatch):
    monkeypatch.setattr(decode, "MOST_PIXELS", 50)

    with pytest.raises(ImageError, match="decompression bomb"):
        decode_rgb(saved(RED, "PNG"))


def test_decodings_that_overlap_leave_the_filters_of_warnings_as_they_were():
    before, (one, other) = list(warnings.filters), (_quiet_pillow(), _quiet_pillow())

    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    during = list(warnings.filters)
    other.__exit__(None, None, None)

    assert during != before
    assert warnings.filters == before


def test_not_a_number_and_floats_become_pixels():
    image = Image.fromarray(np.array([[np.nan, 65535.0, 1e9, -5.0]], np.float32))

    assert np.asarray(decode_rgb(saved(image, "TIFF")))[0, :, 0].tolist() == [0, 255, 255, 0]


def test_the_square_is_cut_where_it_is_asked_for():
    image = Image.new("RGB", (30, 10))
    image.paste((255, 255, 255), (20, 0, 30, 10))

    left, box = square(image, 10, offset=0.0)
    right, _ = square(image, 10, offset=1.0)

    assert box == (0, 0, 10, 10)
    assert np.asarray(left).max() == 0
    assert np.asarray(right).min() == 255


def put(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        RED.save(path, "PNG" if path.suffix == ".png" else "JPEG")


def test_class_folders_a_flat_folder_and_truth_beside_images(tmp_path):
    put(tmp_path / "classes", "cat/b.jpg", "cat/a.JPEG", "dog/c.png")
    put(tmp_path / "flat", "b.jpg", "a.jpg", ".hidden.jpg")
    put(tmp_path / "truth", "images/1.jpg", "labels/1.png")

    classes, flat, truth = (list_images(tmp_path / name) for name in ("classes", "flat", "truth"))

    assert [(p.name, p.class_id) for p in classes.images] == [("cat/a.JPEG", 0), ("cat/b.jpg", 0), ("dog/c.png", 1)]
    assert classes.classes == ("cat", "dog")
    assert [p.name for p in flat.images] == ["a.jpg", "b.jpg"]
    assert flat.classes == ()
    assert [p.name for p in truth.images] == ["1.jpg"]


def test_a_list_file_and_a_tar(tmp_path):
    put(tmp_path, "x/1.jpg", "y/2.jpg")
    (tmp_path / "list.txt").write_text("y/2.jpg\tdog\nx/1.jpg\tcat\n")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("x/1.jpg", "y/2.jpg"):
            tar.add(tmp_path / name, arcname=name)

    text, tar = list_images(tmp_path / "list.txt"), list_images(tmp_path / "set.tar")

    assert [(p.name, p.class_id) for p in text.images] == [("x/1.jpg", 0), ("y/2.jpg", 1)]
    assert tar.classes == ("x", "y")
    assert read_bytes(tar.images[1]) == (tmp_path / "y/2.jpg").read_bytes()


def test_a_name_is_believed_until_the_bytes_are_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved(RED, "PNG"))
    (tmp_path / "b.jpg").write_text("a letter")

    png, letter = list_images(tmp_path).images

    assert decode_rgb(read_bytes(png)).getpixel((0, 0)) == (200, 30, 30)
    with pytest.raises(ImageError, match="not an image"):
        decode_rgb(read_bytes(letter))


def test_hidden_members_and_classes_of_cls_files(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, data in (
            ("1.jpg", saved(RED, "JPEG")),
            ("1.cls", b"7"),
            ("2.jpg", saved(RED, "JPEG")),
            ("2.cls", b"3"),
            ("._2.jpg", b"a fork"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "._set.tar").write_bytes(b"a fork")

    found = list_images(tmp_path)

    assert [(p.name, p.class_id) for p in found.images] == [("set.tar/1.jpg", 1), ("set.tar/2.jpg", 0)]
    assert found.classes == ("3", "7")


def test_what_is_no_tar_is_a_sentence(tmp_path):
    (tmp_path / "set.tar").write_text("a letter")

    with pytest.raises(ValueError, match=r"set\.tar is no whole, uncompressed tar"):
        list_images(tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda path: None, FileNotFoundError, "no images at"),
        (lambda path: path.mkdir(), ValueError, "an empty folder"),
        (lambda path: path.write_text("nowhere.jpg\n"), FileNotFoundError, r"line 1 names nowhere\.jpg"),
    ],
)
def test_a_source_without_images_is_a_sentence(make, error, sentence, tmp_path):
    make(tmp_path / "source")

    with pytest.raises(error, match=sentence):
        list_images(tmp_path / "source")


def test_the_digest_is_of_names_and_classes(tmp_path):
    put(tmp_path / "one", "cat/a.jpg", "dog/b.jpg")
    put(tmp_path / "two", "cat/a.jpg", "dog/b.jpg")
    put(tmp_path / "three", "cat/a.jpg", "dog/c.jpg")

    one, two, three = (list_images(tmp_path / name).digest for name in ("one", "two", "three"))

    assert one == two != three


@pytest.mark.parametrize("others", ["a.jpg\tcat\nb.jpg\tcat\n", "a.jpg\tcat\nb.jpg\towl\n", "a.jpg\tdog\nb.jpg\tcat\n"])
def test_the_same_names_of_other_classes_have_another_digest(others, tmp_path):
    put(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "one.txt").write_text("a.jpg\tcat\nb.jpg\tdog\n")
    (tmp_path / "two.txt").write_text(others)

    assert list_images(tmp_path / "one.txt").digest != list_images(tmp_path / "two.txt").digest
