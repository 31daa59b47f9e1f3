"""G1, G2 for images in an object store: the same names, classes, digest and shards as from a local folder."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tars
from PIL import Image
from pyarrow import fs

from partlearn.config import ExtractConfig
from pipeline.extract import extract
from shards import storage
from shards.images import ImageList, list_images, read_bytes
from training.config import RunConfig


def image(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((48, 40)).save(buffer, kind)
    return buffer.getvalue()


def put(folder: Path, *names: str) -> Path:
    """Files in a folder: images, or what else their names say."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number, "PNG" if name.endswith(".png") else "JPEG"))
    return folder


def packed(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def uploaded(local: Path, store: fs.FileSystem, name: str) -> str:
    """The same file or folder in the bucket."""
    fs.copy_files(str(local), f"images/{name}", source_filesystem=fs.LocalFileSystem(), destination_filesystem=store)
    return f"s3://images/{name}"


def what(found: ImageList) -> tuple:
    """Everything about a list of images but where they lie."""
    named = [(image.name, image.class_id, read_bytes(image)) for image in found.images]
    return found.classes, named, found.digest


FOLDERS = {
    "class folders": ("cat/b.jpg", "cat/a.JPEG", "dog/c.png", "dog/deep/er/d.jpg"),
    "a flat prefix": ("b.jpg", "a.jpg", ".hidden.jpg", "notes.txt"),
    "truth beside images": ("images/1.jpg", "images/2.jpg", "labels/1.png", "labels/2.png"),
    "one class alone": ("cat/1.jpg", "cat/2.jpg"),
    "names of all kinds": ("a b.jpg", "c#1.jpg", "d?e.jpg", "f%20g.jpg", "h+i&j=k.jpg", "ü/l.jpg"),
}


@pytest.mark.parametrize("names", FOLDERS.values(), ids=FOLDERS.keys())
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_prefix_is_listed_like_a_folder(names, slash, s3, tmp_path):
    folder = put(tmp_path / "set", *names)

    remote = list_images(uploaded(folder, s3, "set") + slash)

    assert what(remote) == what(list_images(folder))
    assert all(one.location.startswith("s3://images/set/") for one in remote.images)


def test_a_whole_bucket_is_a_source(s3, tmp_path):
    folder = put(tmp_path / "set", "cat/a.jpg", "dog/b.jpg")
    fs.copy_files(str(folder), "images", source_filesystem=fs.LocalFileSystem(), destination_filesystem=s3)

    assert what(list_images("s3://images")) == what(list_images(folder))


def test_a_list_in_the_store_names_files_beside_it_and_anywhere(s3, tmp_path):
    folder = put(tmp_path / "set", "a.jpg", "sub/b.jpg")
    elsewhere = put(tmp_path / "elsewhere", "c.jpg")
    remote_c = uploaded(elsewhere, s3, "elsewhere") + "/c.jpg"
    (folder / "list.txt").write_text(f"sub/b.jpg\tdog\na.jpg\tcat\n\n{remote_c}\tcat\n{elsewhere}/c.jpg\tdog\n")

    remote = list_images(uploaded(folder, s3, "set") + "/list.txt")
    local = list_images(folder / "list.txt")

    assert what(remote) == what(local)
    assert remote.classes == ("cat", "dog")
    assert {one.name: one.location for one in remote.images} == {
        "a.jpg": "s3://images/set/a.jpg",
        "sub/b.jpg": "s3://images/set/sub/b.jpg",
        remote_c: remote_c,
        f"{elsewhere}/c.jpg": f"{elsewhere}/c.jpg",
    }


def test_a_tar_in_the_store_gives_its_members_by_range(s3, tmp_path):
    members = {"1.jpg": image(1), "1.cls": b"7", "2.jpg": image(2), "2.cls": b"3", "._2.jpg": b"a fork"}
    tar = packed(tmp_path / "set.tar", members)

    remote = list_images(uploaded(tar, s3, "set.tar"))

    assert what(remote) == what(list_images(tar))
    assert [(one.name, one.class_id) for one in remote.images] == [("set.tar/1.jpg", 1), ("set.tar/2.jpg", 0)]
    assert [read_bytes(one) for one in remote.images] == [members["1.jpg"], members["2.jpg"]]


def test_a_folder_of_tars_in_the_store_is_one_source(s3, tmp_path):
    packed(tmp_path / "tars/one.tar", {"cat/1.jpg": image(1), "dog/2.jpg": image(2)})
    packed(tmp_path / "tars/two.tar", {"cat/1.jpg": image(3)})

    remote = list_images(uploaded(tmp_path / "tars", s3, "tars"))

    assert what(remote) == what(list_images(tmp_path / "tars"))
    assert [one.name for one in remote.images] == ["one.tar/cat/1.jpg", "one.tar/dog/2.jpg", "two.tar/cat/1.jpg"]


def test_what_is_no_tar_is_a_sentence_there_too(s3, tmp_path):
    (tmp_path / "set.tar").write_text("a letter")

    with pytest.raises(ValueError, match=r"s3://images/set\.tar is no whole, uncompressed tar"):
        list_images(uploaded(tmp_path / "set.tar", s3, "set.tar"))


@pytest.mark.parametrize("nowhere", ["s3://images/nowhere", "s3://images/none.txt", "s3://images/none.tar"])
def test_a_place_without_anything_is_a_sentence(nowhere, s3):
    with pytest.raises(FileNotFoundError, match=f"no images at {nowhere}: expected a folder, a text file of paths"):
        list_images(nowhere)


def test_a_prefix_without_images_says_what_is_there(s3, tmp_path):
    folder = put(tmp_path / "set", "a.txt", "b.txt", "c.csv")

    with pytest.raises(ValueError, match=r"no images in s3://images/set: .* found 2 \.txt, 1 \.csv"):
        list_images(uploaded(folder, s3, "set"))


@pytest.mark.parametrize(("offset", "size"), [(0, storage.WHOLE_FILE), (0, 10), (100, 37), (300, storage.WHOLE_FILE)])
def test_any_stretch_of_a_file_is_read(offset, size, s3, tmp_path):
    file = put(tmp_path / "set", "a.jpg") / "a.jpg"
    remote = uploaded(file.parent, s3, "set") + "/a.jpg"

    assert storage.read(remote, offset, size) == storage.read(str(file), offset, size)


def test_a_store_that_nobody_knows_is_a_sentence():
    with pytest.raises(ValueError, match=r"ftp://host cannot be opened .* expected s3://, gs:// or a path"):
        storage.read("ftp://host/file.jpg")


def extracted(images: str, parts: Path, out: Path) -> dict[str, str]:
    config = ExtractConfig(
        images=images, parts=parts, size=32, samples_per_shard=3, batch_size=2, backend="local",
        run=RunConfig(out=out, device="cpu", precision="fp32"),
    )  # fmt: skip
    extract(config)
    return tars(out)


@pytest.mark.parametrize("kind", ["class folders", "tar"])
def test_g1_extraction_from_a_store_gives_the_bytes_of_the_same_images_here(kind, learned, s3, tmp_path):
    """One is a letter with an image's name: it is rejected in both, and nothing else is."""
    folder = put(tmp_path / "set", "cat/1.jpg", "cat/2#.jpg", "cat/3.jpg", "dog/4.jpg", "dog/5.png", "dog/6.jpg")
    (folder / "dog/7.jpg").write_text("a letter")
    local = folder
    if kind == "tar":
        files = sorted(path for path in folder.rglob("*.*") if path.is_file())
        local = packed(tmp_path / "set.tar", {str(path.relative_to(folder)): path.read_bytes() for path in files})
    remote = uploaded(local, s3, local.name)

    there = extracted(remote, learned, tmp_path / "there")

    assert there == extracted(str(local), learned, tmp_path / "here")
    for out in ("there", "here"):
        rejected = pq.read_table(tmp_path / out / "rejected.parquet").to_pylist()
        assert [row["source"].rpartition("/")[2] for row in rejected] == ["7.jpg"]


def test_g2_an_image_that_is_gone_is_rejected_with_the_reason(learned, s3, tmp_path):
    folder = put(tmp_path / "set", "1.jpg", "2.jpg")
    remote = uploaded(folder, s3, "set")
    (tmp_path / "list.txt").write_text(f"{remote}/1.jpg\n{remote}/gone.jpg\n{remote}/2.jpg\n")

    extracted(str(tmp_path / "list.txt"), learned, tmp_path / "out")

    (rejected,) = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert (rejected["source"], rejected["step"]) == (f"{remote}/gone.jpg", "read")
    assert "does not exist" in rejected["reason"]
