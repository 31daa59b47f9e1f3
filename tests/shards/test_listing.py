"""Nothing that lies in a source is seen and not taken without a word, and classes are never lost as a whole."""

import io
import os
import tarfile
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import decode, images
from shards.decode import ImageError, decode_rgb
from shards.formats import FORMATS, SUFFIXES
from shards.images import list_images, read_bytes, read_rgb
from training.contact_sheet import png_of


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (shade, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def put(folder: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(shade))
    return folder


def tar_of(members: dict[str, bytes | str]) -> bytes:
    """A tar; a member that is a string is a hard link to that name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.LNKTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def packed(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members))
    return path


def named(source: Path) -> dict[str, str | None]:
    """Every image of a source and the name of its class."""
    listed = list_images(source)
    return {one.name: listed.classes[one.class_id] if one.class_id >= 0 else None for one in listed.images}


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path, capsys):
    images._said.clear()
    folder = put(tmp_path / "p", "cat/1.jpg", "dog/1.jpg")
    (folder / "cat/2.jpg").symlink_to("/nowhere/2.jpg")
    (folder / "cat/3.jpg").symlink_to("3.jpg")

    listed = list_images(folder)

    assert [(one.name, bool(one.fault)) for one in listed.images] == [
        ("cat/1.jpg", False),
        ("cat/2.jpg", True),
        ("cat/3.jpg", True),
        ("dog/1.jpg", False),
    ]
    with pytest.raises(ImageError, match=r"a link to /nowhere/2\.jpg") as raised:
        read_rgb(listed.images[1])
    assert raised.value.step == "read"
    assert "2 cannot be read, the first, cat/2.jpg: a link to" in capsys.readouterr().err


def test_links_that_lead_back_up_end_and_each_file_comes_once(tmp_path):
    put(tmp_path, "beside/3.jpg", "elsewhere/owl/4.jpg")
    folder = put(tmp_path / "p", "cat/1.jpg", "dog/2.jpg")
    (folder / "cat/up").symlink_to("..")
    (folder / "cat/above").symlink_to(tmp_path)
    (folder / "kitten").symlink_to("cat")
    (folder / "owl").symlink_to(tmp_path / "elsewhere/owl")

    listed = list_images(folder)

    assert [one.name for one in listed.images] == ["cat/1.jpg", "dog/2.jpg", "owl/4.jpg"]
    assert listed.classes == ("cat", "dog", "owl")
    assert dict(listed.left_out) == {"links to folders that are read already, or that hold this one": 3}


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = put(tmp_path / "p", "cat/1.jpg", "owl/1.jpg")
    scandir = os.scandir

    def refused(path):  # root may read every folder
        if str(path).endswith("owl"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)

    with pytest.raises(ValueError, match="p/owl may not be read"):
        list_images(folder)


def test_a_name_that_is_not_utf_8_is_escaped_and_the_rest_is_taken(tmp_path):
    folder = put(tmp_path / "p", "a.jpg")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(jpeg())

    first, second = list_images(folder).images

    assert (first.name, first.fault) == ("a.jpg", "")
    assert (second.name, second.fault) == ("caf\\xe9.jpg", "its name is not UTF-8; rename it")


def test_suffixes_that_pillow_reads_and_first_bytes_where_a_suffix_says_nothing(tmp_path, capsys):
    images._said.clear()
    folder = put(tmp_path, "a.jfif", "b.jpe", "c", "d.jpg_large", ".hidden.jpg", "@eaDir/e.jpg", "run/parts.png")
    for name in ("f.ppm", "g.jp2", "h.tga", "i.avif"):
        Image.new("RGB", (9, 7)).save(folder / name)
    for name in ("IMG_1.HEIC", "notes", "Thumbs.db", "table.csv", "run/environment.json", "run/config.json"):
        (folder / name).write_bytes(b"....ftypheic no picture")

    listed = list_images(folder)

    names = [one.name for one in listed.images]
    assert names == ["a.jfif", "b.jpe", "c", "d.jpg_large", "f.ppm", "g.jp2", "h.tga", "i.avif"]
    assert all(read_rgb(one).mode == "RGB" for one in listed.images)
    assert dict(listed.left_out) == {
        ".heic": 1,
        "without suffix": 1,
        "Thumbs.db": 1,
        ".csv": 1,
        "hidden": 1,
        "@eaDir": 1,
        "run folder or shard set": 1,
    }
    assert "1 .heic" in capsys.readouterr().err


def test_suffixes_are_those_of_the_formats_and_no_format_starts_a_program():
    Image.init()

    theirs = {suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS}

    assert theirs <= SUFFIXES
    assert not {"EPS", "WMF", "HDF5", "GRIB", "BUFR", "MPEG"} & set(FORMATS)
    with pytest.raises(ImageError, match="not an image"):
        decode_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_a_large_image_waits_for_the_other_and_the_limit_is_put_back(monkeypatch):
    monkeypatch.setattr(decode, "LARGE", 50)
    before = Image.MAX_IMAGE_PIXELS

    held = []
    monkeypatch.setattr(decode, "_as_rgb", lambda image: held.append(decode._one_large.locked()) or image)
    decode_rgb(jpeg())

    assert held == [True]
    assert (decode._one_large.locked(), Image.MAX_IMAGE_PIXELS) == (False, before)


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "validation"), ("train2017", "test_images")])
def test_a_folder_of_splits_is_refused(names, tmp_path):
    folder = put(tmp_path / "p", *(f"data/{name}/{label}/1.jpg" for name in names for label in ("cat", "dog")))

    with pytest.raises(ValueError, match=f"p/data holds the splits {names[0]} and {names[1]}; name one of them"):
        list_images(folder)


def test_one_image_without_a_class_is_told_and_keeps_the_rest(tmp_path, capsys):
    images._said.clear()
    folder = put(tmp_path / "p", "cat/1.jpg", "dog/1.jpg", "montage.jpg")

    assert named(folder) == {"cat/1.jpg": "cat", "dog/1.jpg": "dog", "montage.jpg": None}
    assert "1 without a class, the first montage.jpg" in capsys.readouterr().err


def test_dotted_keys_keep_their_own_labels(tmp_path):
    members = {"22.05.jpg": jpeg(), "22.05.cls": b"0", "22.06.jpg": jpeg(), "22.06.cls": b"1", "7.jpg": jpeg()}

    found = named(packed(tmp_path / "in.tar", members))

    assert found == {"in.tar/22.05.jpg": "0", "in.tar/22.06.jpg": "1", "in.tar/7.jpg": None}


@pytest.mark.parametrize("labels", [{"22.cls": b"1", "22.05.cls": b"0"}, {"22.06.cls": b"1"}])
def test_two_readings_of_a_key_are_refused(labels, tmp_path):
    path = packed(tmp_path / "in.tar", {"22.05.jpg": jpeg(), **labels})

    with pytest.raises(ValueError, match=rf"22\.05\.jpg has the class of .*{next(iter(labels))}"):
        list_images(path)


def test_links_in_a_tar_are_read_where_they_lead(tmp_path):
    path = packed(tmp_path / "in.tar", {"a.jpg": jpeg(9), "b.jpg": "a.jpg", "c.jpg": "gone.jpg"})

    one, link, gone = list_images(path).images

    assert read_bytes(link) == read_bytes(one) == jpeg(9)
    assert gone.fault == "a link to gone.jpg, which the tar does not hold"


def test_a_tar_cut_between_members_or_longer_than_its_end_is_refused(tmp_path):
    whole = tar_of({"a.jpg": jpeg(), "b.jpg": jpeg()})
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        second = tar.getmember("b.jpg").offset
    (tmp_path / "cut.tar").write_bytes(whole[:second])
    (tmp_path / "long.tar").write_bytes(whole + tar_of({"c.jpg": jpeg()}))

    with pytest.raises(ValueError, match=r"cut\.tar is no whole tar: it ends after a\.jpg"):
        list_images(tmp_path / "cut.tar")
    with pytest.raises(ValueError, match=r"long\.tar goes on after its end"):
        list_images(tmp_path / "long.tar")


def test_imagenet_as_it_comes(tmp_path):
    a, b = ({f"{wnid}_{number}.JPEG": jpeg(number) for number in (1, 2)} for wnid in ("n01440764", "n01443537"))
    packed(tmp_path / "tars/n01440764.tar", a)
    packed(tmp_path / "tars/n01443537.tar", b)
    packed(tmp_path / "ILSVRC.tar", {"n01440764.tar": tar_of(a), "n01443537.tar": tar_of(b)})
    packed(tmp_path / "train.tar", {"train/cat/1.jpg": jpeg(), "train/dog/2.jpg": jpeg()})
    packed(tmp_path / "absolute.tar", {"/data/train/cat/1.jpg": jpeg(), "/data/train/dog/2.jpg": jpeg()})
    packed(tmp_path / "wds/in1k-train-0000.tar", {"x.jpg": jpeg(), "x.cls": b"3", "x.json": b"{}"})
    packed(tmp_path / "wds/in1k-train-0001.tar", {"y.jpg": jpeg(), "y.cls": b"12", "y.json": b"{}"})
    packed(tmp_path / "numbered/0000.tar", {"x.jpg": jpeg()})
    packed(tmp_path / "numbered/0001.tar", {"y.jpg": jpeg()})

    tars, nested = named(tmp_path / "tars"), list_images(tmp_path / "ILSVRC.tar")

    assert list(tars.values()) == ["n01440764"] * 2 + ["n01443537"] * 2
    assert [one.name for one in nested.images] == [f"ILSVRC.tar/{name}" for name in tars]
    assert nested.classes == ("n01440764", "n01443537")
    assert read_bytes(nested.images[3]) == jpeg(2)
    assert list(named(tmp_path / "train.tar").values()) == ["cat", "dog"]
    assert named(tmp_path / "absolute.tar") == {
        "absolute.tar/data/train/cat/1.jpg": "cat",
        "absolute.tar/data/train/dog/2.jpg": "dog",
    }
    assert list_images(tmp_path / "wds").classes == ("3", "12")
    assert list_images(tmp_path / "numbered").classes == ()


def test_tars_of_two_splits_in_one_folder_are_refused(tmp_path):
    for split in ("train", "validation"):
        packed(tmp_path / f"imagenet1k-{split}-0000.tar", {"x.jpg": jpeg(), "x.cls": b"3"})

    with pytest.raises(ValueError, match="holds tars of the splits train and val"):
        list_images(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "a b.jpg\tred fox\nc,d.jpg\tdog\ne.jpg\n",
        "a b.jpg,red fox\nc,d.jpg,dog\ne.jpg\n",
        "\ufeffa b.jpg red fox\r\nc,d.jpg dog\r\ne.jpg\r\n",
        '"a b.jpg", red fox\n\n"c,d.jpg", dog\ne.jpg\n',
    ],
    ids=["tab", "comma", "blank", "quoted"],
)
def test_a_class_follows_a_tab_a_comma_or_a_blank_and_paths_may_hold_them(text, tmp_path):
    put(tmp_path, "a b.jpg", "c,d.jpg", "e.jpg")
    (tmp_path / "list.txt").write_bytes(text.encode())

    assert named(tmp_path / "list.txt") == {"a b.jpg": "red fox", "c,d.jpg": "dog", "e.jpg": None}


def test_one_file_under_two_spellings_is_refused_and_either_form_of_a_name_is_found(tmp_path):
    put(tmp_path, "a.jpg", unicodedata.normalize("NFD", "é.jpg"))
    (tmp_path / "twice.txt").write_text("a.jpg\n./a.jpg\n")
    (tmp_path / "form.txt").write_text("é.jpg\n")

    with pytest.raises(ValueError, match=r"names \./a\.jpg more than once, in lines 1 and 2"):
        list_images(tmp_path / "twice.txt")
    assert read_bytes(list_images(tmp_path / "form.txt").images[0]) == jpeg(1)


def test_a_sheet_of_ours_among_images_is_none(tmp_path):
    put(tmp_path, "cat/1.png", "dog/2.png", "3.png")
    tiles = np.zeros((1, 8, 8, 3), np.uint8)
    (tmp_path / "sheet.png").write_bytes(png_of(("image",), [tiles]))

    listed = list_images(tmp_path)

    assert [image.name for image in listed.images] == ["3.png", "cat/1.png", "dog/2.png"]
    assert listed.left_out == (("sheet of ours", 1),)


def test_what_stands_beside_images_and_their_truth_is_counted(tmp_path):
    folder = put(tmp_path, "set/images/1.jpg", "set/labels/1.png", "set/more/2.jpg", "set/3.jpg")

    assert list_images(folder / "set").left_out == (("beside images/", 2),)
    with pytest.raises(ValueError, match=r"set/ holds images/ beside labels/, which hold no images; name that folder"):
        list_images(folder)


def test_a_class_folder_with_a_file_of_that_name_is_no_run_of_ours(tmp_path):
    folder = put(tmp_path, "cat/1.jpg", "dog/2.jpg")
    (folder / "dog/environment.json").write_text("{}")

    assert list_images(folder).classes == ("cat", "dog")


@pytest.mark.parametrize("notes", [{}, {"notes.json": b"{}"}], ids=["beside the tars", "in them"])
def test_a_json_that_is_of_no_image_takes_no_classes(notes, tmp_path):
    for name in ("cat", "dog"):
        packed(tmp_path / f"{name}.tar", {"1.jpg": jpeg(), "2.jpg": jpeg(1)} | notes)
    (tmp_path / "class_index.json").write_text("{}")

    assert list_images(tmp_path).classes == ("cat", "dog")


def test_classes_that_are_not_utf_8_are_told_apart(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.txt").write_bytes(b"a.jpg\tcaf\xe9\nb.jpg\tcaf\xe8\n")
    packed(tmp_path / "set.tar", {"a.jpg": jpeg(), "a.cls": b"caf\xe9", "b.jpg": jpeg(1), "b.cls": b"caf\xe8"})

    for source in ("list.txt", "set.tar"):
        assert list_images(tmp_path / source).classes == ("caf\\xe8", "caf\\xe9")


def test_classes_that_are_the_same_number_have_one_order(tmp_path):
    folder = put(tmp_path, "1/a.jpg", "01/b.jpg", "2/c.jpg")

    assert list_images(folder).classes == ("01", "1", "2")


def test_an_image_is_not_bad_because_memory_ran_out():
    def use(image: Image.Image) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        decode.decode_with(jpeg(), use)


def test_of_large_images_one_at_a_time_is_in_memory_while_it_is_used(monkeypatch):
    monkeypatch.setattr(decode, "LARGE", 50)
    inside: list[Image.Image] = []
    most: list[int] = []

    def use(image: Image.Image) -> None:
        inside.append(image)
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decode.decode_with(jpeg(), use), range(8)))

    assert most == [1] * 8
