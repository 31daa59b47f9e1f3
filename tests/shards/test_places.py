"""`~` is a home folder wherever a path may stand, and what cannot be written is found before the work."""

import os
from pathlib import Path

import pytest
from conftest import write_set

from pipeline.creatures import write_creatures
from shards.images import list_images
from shards.places import at_home, refuse_unwritable

IN_HOME = ("~", "~/x", "run:~/runs/a", "ibot:~/w.pth", "timm:vit_base=~/w.pth", "timm:hub:a/b=~/w.pth")
AS_THEY_ARE = (
    *("x", "/a/~b", "a~", "./~x", "photos/~x", "builtin", "timm:vit_tiny", "timm:vit=/w/~a.pth"),
    *("s3://bucket/~x", "gs://bucket/a=~x", "", 3, None, 0.5),
)


@pytest.mark.parametrize("source", IN_HOME)
def test_a_home_is_written_out_behind_every_kind_of_source(source, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")

    assert at_home(source) == source.replace("~", "/home/me")


@pytest.mark.parametrize("value", AS_THEY_ARE)
def test_what_is_no_home_stays_as_it_is(value):
    assert at_home(value) == value
    assert at_home((value, "y")) == (value, "y")


def test_paths_stay_paths_and_tuples_tuples(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")

    assert at_home((Path("~/a"), "~/b")) == (Path("/home/me/a"), "/home/me/b")
    assert at_home("~root/x") == os.path.expanduser("~root") + "/x"  # noqa: PTH111


def test_a_home_that_nobody_has_is_one_sentence():
    with pytest.raises(ValueError, match=r"^run:~no-such-account/x begins at ~no-such-account"):
        at_home("run:~no-such-account/x")


def test_lines_of_a_list_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/a.jpg").touch()
    (tmp_path / "list.txt").write_text("~/a.jpg\n")

    (image,) = list_images(str(tmp_path / "list.txt")).images

    assert (image.name, image.location) == ("~/a.jpg", str(tmp_path / "home/a.jpg"))


@pytest.mark.parametrize(
    "url", ["s3://bucket/set", "gs://b/x", "http://host/x", "https://h/x", "file:///tmp/x", "hf://d/x"]
)
def test_a_url_is_no_place_to_write_to(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(
        ValueError, match="is a URL, and results are written to local folders; write to one, then upload"
    ):
        refuse_unwritable(Path(url))
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_python_gave_unexpanded_makes_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match="--out ~/set would be a folder named ~; write the whole path"):
        refuse_unwritable(Path("~/set"))


def test_a_file_on_the_way_and_a_folder_at_the_end_are_named(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(ValueError, match=r"--out .*file/a/b needs a folder, and .*file is a file"):
        refuse_unwritable(tmp_path / "file/a/b")
    with pytest.raises(ValueError, match=r"--json .* is a folder, and a file is written there"):
        refuse_unwritable(tmp_path, flag="--json", folder=False)


@pytest.mark.parametrize("place", ["new", "new/below", "."])
def test_what_can_be_written_passes_and_is_not_made(place, tmp_path):
    refuse_unwritable(tmp_path / place)
    refuse_unwritable(tmp_path / place / "rows.json", flag="--json", folder=False)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [".", "new", "new/below", "hidden/new"])
def test_a_folder_of_somebody_else_is_refused(place, public, another_account):
    (public / "hidden").mkdir(mode=0o700)
    (public / "hidden").chmod(0o500)
    public.chmod(0o555)

    with another_account(), pytest.raises(ValueError, match=r"cannot be written .*Permission denied"):
        refuse_unwritable(public / place)
    (public / "hidden").chmod(0o700)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o002, 0o664, 0o775), (0o022, 0o644, 0o755)])
def test_sets_and_drawings_follow_the_umask(tmp_path, mask, file, folder):
    before = os.umask(mask)
    try:
        write_set(tmp_path / "out/set", count=4)
        write_creatures(tmp_path / "out/drawn", count=0, seed=0)
    finally:
        os.umask(before)

    made = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(made) > 10
    assert [path for path in made if path.stat().st_mode & 0o777 != (folder if path.is_dir() else file)] == []
