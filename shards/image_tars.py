"""The images in tars, each where its bytes lie."""

import posixpath
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from pyarrow import NativeFile

from shards import storage
from shards.formats import FIRST_BYTES, OTHERS, SUFFIXES, kind_of, set_aside, starts_like_an_image, suffix_of
from shards.found import SPLITS, Found, Listing, labels_of, printable

BLOCK, CHUNK = 512, 1 << 20
OF_SHARDS = ("of", "shard", "part", "images", "imgs", "set", "data", "split")
"""Words behind the name of a split."""
Reader = BinaryIO | NativeFile


class Member(NamedTuple):
    """A file in a tar, or in a tar in it: its name without `./` or `/` in front, and where its bytes are."""

    name: str
    offset: int
    size: int
    fault: str = ""


def list_tar(location: str, listing: Listing, folder: str) -> None:
    """Take the images in one tar, named `FOLDER/MEMBER`; tars in it are taken for folders.

    A class is that of `KEY.cls`, where KEY is the image's name without its suffix or up to an earlier dot.

    Raises:
        ValueError: It is no whole, uncompressed tar, or an image has two classes.
    """
    try:
        with storage.open_binary(location) as file:
            members = list(_members(file, location, 0, None))
            _take(file, location, members, listing, folder)
    except tarfile.TarError as error:
        raise ValueError(f"{location} is no whole, uncompressed tar ({error}); fetch it again or unpack it") from None


def list_tars(tars: dict[str, str], source: str, listing: Listing) -> None:
    """Take the images of several tars as one source; a tar is a class where nothing else tells one.

    Raises:
        ValueError: As `list_tar`, or they are of several splits.
    """
    _refuse_splits_of_tars(tars, source)
    for name in sorted(tars):
        list_tar(tars[name], listing, name)
    images = listing.images
    if any(one.label for one in images) or _numbered(tars) or listing.keyed:
        return
    if len(set(labels_of([one.path for one in images], source)) - {""}) < 2:
        listing.images = [one._replace(path=one.name.replace(".tar/", "/", 1)) for one in images]


def _refuse_splits_of_tars(names: Iterable[str], source: str) -> None:
    splits: dict[str, str] = {}
    for name in sorted(names):
        words = [word for word in re.findall("[a-z]+", name.lower().removesuffix(".tar")) if word not in OF_SHARDS]
        if words and words[-1] in SPLITS:
            splits.setdefault(SPLITS[words[-1]], name)
    if len(splits) > 1:
        raise ValueError(
            f"{source} holds tars of the splits {' and '.join(splits)} ({', '.join(splits.values())}); give each split "
            "a folder of its own and name one of them"
        )


def _numbered(names: Iterable[str]) -> bool:
    """Whether tars are the numbered shards of a set, not one for each class."""
    stems = [name.removesuffix(".tar") for name in names]
    numbers = sorted(int(digits[0]) for stem in stems if (digits := re.findall(r"\d+", stem)))
    alike = len({re.sub(r"\d+", "#", stem) for stem in stems}) == 1
    in_a_row = bool(numbers) and numbers == list(range(numbers[0], numbers[0] + len(stems)))
    return alike and (in_a_row or not re.search("[A-Za-z]", stems[0]) or "-of-" in stems[0])


def _members(file: Reader, location: str, start: int, end: int | None, inside: str = "") -> Iterator[Member]:
    """The files in the tar from `start` on, those of tars in it among them.

    Raises:
        ValueError: It is cut between members, or goes on after its end.
        tarfile.TarError: It is cut elsewhere, or is no tar.
    """
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = list(tar)
        _check_end(file, tar.offset, end, f"{location}{f' ({inside})' if inside else ''}", members)
    named = {_plain(member.name): member for member in members}
    for member in members:
        if member.isdir():
            continue
        found = _followed(member, named)
        name = inside + _plain(member.name)
        if name.endswith(".tar") and not found.fault and not set_aside(name):
            yield from _members(file, location, found.offset, found.offset + found.size, f"{name}/")
        else:
            yield found._replace(name=name)


def _plain(name: str) -> str:
    return posixpath.normpath(name).lstrip("/") if name.startswith((".", "/")) else name


def _check_end(file: Reader, at: int, end: int | None, what: str, members: list[tarfile.TarInfo]) -> None:
    """A tar ends with a block of zeros; without it, members are missing, and nothing else would show it."""
    file.seek(at)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK or any(mark) or (end is not None and at + BLOCK > end):
        last = f" after {printable(members[-1].name)}" if members else ""
        raise ValueError(f"{what} is no whole tar: it ends{last} without the mark of a tar's end; fetch it again")
    while end is None and (rest := file.read(CHUNK)):
        if rest.strip(b"\0"):
            raise ValueError(f"{what} goes on after its end, as tars joined by `cat` do; join them by `tar -A`")


def _followed(member: tarfile.TarInfo, named: dict[str, tarfile.TarInfo]) -> Member:
    """Where the bytes of a member are: of a hard or soft link, those of the member that it leads to."""
    one, steps = member, 0
    while one.islnk() or one.issym():
        target = one.linkname if one.islnk() else posixpath.join(posixpath.dirname(one.name), one.linkname)
        following, steps = named.get(_plain(posixpath.normpath(target))), steps + 1
        if following is None or steps > len(named):
            return Member(member.name, 0, 0, f"a link to {printable(one.linkname)}, which the tar does not hold")
        one = following
    if not one.isfile() or one.issparse():
        return Member(member.name, 0, 0, "a sparse file" if one.issparse() else "neither file nor link")
    return Member(member.name, one.offset_data, one.size)


def _take(file: Reader, location: str, members: list[Member], listing: Listing, folder: str) -> None:
    labels = {m.name[:-4]: _text(file, m) for m in members if m.name.endswith(".cls") and not m.fault}
    images = [member for member in members if _is_image(file, member, listing)]
    stems = {member.name.rpartition(".")[0] for member in images}
    listing.keyed |= any(m.name.endswith(".json") and m.name[:-5] in stems for m in members)
    keys = stems | {_key(member.name) for member in images}
    orphans = [stem for stem in labels if stem not in keys and not any(_key(stem) == _key(key) for key in keys)]
    listing.left_out.update([".cls"] * len(orphans))
    classes = _Classes(labels, [member.name for member in images], location)
    for name, offset, size, fault in images:
        path = name.replace(".tar/", "/")
        listing.take(Found(f"{folder}/{name}", location, path, classes.of(name), offset, size, fault))


def _is_image(file: Reader, member: Member, listing: Listing) -> bool:
    aside, suffix = set_aside(member.name), suffix_of(member.name)
    if aside:
        listing.left_out[aside] += 1
        return False
    if suffix in SUFFIXES:
        return True
    if suffix == ".cls" and not member.fault:
        return False
    if suffix not in OTHERS and not member.fault:
        file.seek(member.offset)
        if starts_like_an_image(file.read(min(member.size, FIRST_BYTES))):
            return True
    listing.left_out[kind_of(member.name)] += 1
    return False


def _text(file: Reader, member: Member) -> str:
    file.seek(member.offset)
    return file.read(member.size).decode(errors="surrogateescape").strip()


class _Classes:
    """The `.cls` of each image of a tar. WebDataset ends a key at the first dot of a name, other tools at its suffix:
    both are read, and refused where they differ."""

    def __init__(self, labels: dict[str, str], names: list[str], location: str):
        self.labels, self.location = labels, location
        stems = {name.rpartition(".")[0] for name in names}
        self.alone: dict[str, list[str]] = defaultdict(list)
        for stem in labels:
            if stem not in stems and stem != _key(stem):
                self.alone[_key(stem)].append(stem)

    def of(self, name: str) -> str:
        folder, _, last = name.rpartition("/")
        parts = last.split(".")
        stems = [posixpath.join(folder, ".".join(parts[:end])) for end in range(len(parts) - 1, 0, -1)]
        mine = [stem for stem in stems if stem in self.labels]
        if not mine:
            mine = self.alone.get(_key(name), [])[:1]
            if not mine:
                return ""
            self._refuse(name, f"{mine[0]}.cls, or none")
        if len({self.labels[stem] for stem in mine}) > 1:
            self._refuse(name, f"{mine[0]}.cls or of {mine[1]}.cls")
        return self.labels[mine[0]]

    def _refuse(self, name: str, readings: str) -> None:
        raise ValueError(
            f"{self.location}: {name} has the class of {readings}, by where its key ends: at its first dot "
            "(WebDataset) or before its suffix; rename its members without dots"
        )


def _key(name: str) -> str:
    """WebDataset's key: the name up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return posixpath.join(folder, last.partition(".")[0])
