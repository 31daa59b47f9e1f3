"""A shard is written whole or not at all, and the same bytes every time: tar, then index, then sidecar."""

import dataclasses
import hashlib
import os
import tarfile
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from shards.atomic import sync_folder, write_json, write_whole
from shards.index import BOX, MEMBERS, table_bytes, table_of
from shards.sample import LabelledImage, Rejected, check_labels, npy_bytes

BLOCK, RECORD = 512, 10_240


def shard_paths(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Tar, index and sidecar of a shard."""
    stem = folder / "shards" / f"{number:06d}"
    return stem.with_suffix(".tar"), stem.with_suffix(".parquet"), stem.with_suffix(".json")


def write_shard(
    folder: Path,
    number: int,
    samples: Iterable[LabelledImage],
    *,
    groups: int,
    plan_digest: str,
    rejected: list[Rejected],
    computed: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Commit one shard and return its sidecar, which is written last: with it, the shard is done.

    `rejected` is read after `samples` is used up, so that the generator of samples may fill it. Two writers of the
    same shard write the same bytes; the later rename wins and changes nothing. `computed` goes into the sidecar: device
    type and precision of the labels.

    Raises:
        ShardError: A sample's labels are out of range, or its ranks no permutation.
        OSError: The disk is full, say; nothing of this shard is left behind.
    """
    tar, index, sidecar = shard_paths(folder, number)
    tar.parent.mkdir(exist_ok=True)
    sidecar.unlink(missing_ok=True)  # an old one must not vouch for new bytes
    aside = tar.with_name(f".{tar.name}.{uuid.uuid4().hex}")
    try:
        with open(aside, "wb") as file:
            writer = _TarWriter(file)
            rows = [_write_sample(writer, sample, groups) for sample in samples]
            writer.finish()
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, tar)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(tar.parent)
    table = table_bytes(table_of(rows))
    write_whole(index, table)
    committed = {
        "plan": plan_digest,
        **(computed or {}),
        "samples": len(rows),
        "tar": {"bytes": writer.offset, "sha256": writer.digest.hexdigest()},
        "index": {"bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()},
        "rejected": [dataclasses.asdict(one) for one in rejected],
    }
    write_json(sidecar, committed)
    return committed


def header_of(name: str, size: int) -> bytes:
    """The header of a member: a function of its name and size alone."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


class _TarWriter:
    """USTAR members whose headers depend on name and size alone; counts and hashes as it goes."""

    def __init__(self, file: BinaryIO):
        self.file, self.offset, self.digest = file, 0, hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its first byte."""
        self._write(header_of(name, len(data)))
        at = self.offset
        self._write(data + bytes(-len(data) % BLOCK))
        return at

    def finish(self) -> None:
        """Two zero blocks, padded to a record."""
        end = self.offset + 2 * BLOCK
        self._write(bytes(2 * BLOCK + -end % RECORD))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.offset += len(data)


def _write_sample(writer: _TarWriter, sample: LabelledImage, groups: int) -> dict[str, Any]:
    """The members of a sample side by side, and its row of the index."""
    check_labels(sample.parts, sample.fgrank, groups=groups, name=sample.source)
    row: dict[str, Any] = {
        "key": sample.key,
        "source": sample.source,
        "class_id": sample.class_id,
        "src_width": sample.src_width,
        "src_height": sample.src_height,
        "confidence": sample.confidence,
        "jpg_offset": 0,
        "jpg_size": len(sample.jpeg),
        "crc32_jpg": zlib.crc32(sample.jpeg),
        "attn_peak": None if sample.attn_peak is None else sample.attn_peak.tolist(),
    }
    if sample.jpeg:
        row["jpg_offset"] = writer.add(f"{sample.key}.jpg", sample.jpeg)
        if sample.class_id >= 0:
            writer.add(f"{sample.key}.cls", str(sample.class_id).encode())
    for member in MEMBERS:
        array = getattr(sample, member)
        data = b"" if array is None else npy_bytes(array)
        row[f"{member}_offset"] = writer.add(f"{sample.key}.{member}.npy", data) if data else 0
        row[f"crc32_{member}"] = zlib.crc32(data)
        if data:
            row["span_end"] = row[f"{member}_offset"] + len(data)
    row["jpg_offset"] = row["jpg_offset"] or row["parts_offset"]
    return row | dict(zip(BOX, sample.box, strict=True))
