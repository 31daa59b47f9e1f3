"""The index of a set: where each sample lies, its class and its checksums. Parquet, and 52 bytes a row in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Shaped

MEMBERS = ("parts", "fgrank", "attn")
PIECE = 65_536
BOX = ("x0", "y0", "x1", "y1")
COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("class_id", pa.int32()),
        ("src_width", pa.int32()),
        ("src_height", pa.int32()),
        ("confidence", pa.uint8()),
        *((side, pa.float32()) for side in BOX),
        ("jpg_offset", pa.uint64()),
        ("jpg_size", pa.uint32()),
        *((f"{member}_offset", pa.uint64()) for member in MEMBERS),
        ("span_end", pa.uint64()),
        *((f"crc32_{member}", pa.uint32()) for member in ("jpg", *MEMBERS)),
        ("attn_peak", pa.list_(pa.float32())),
    ]
)
"""Offsets are of a member's first byte in its tar."""
OF_ATTENTION = ("attn_offset", "crc32_attn", "attn_peak")


class Row(NamedTuple):
    """A sample in memory. Members count from `begin`, the byte of the tar where the sample's first one starts."""

    shard: int
    key: int
    class_id: int
    begin: int
    jpg_size: int
    parts: int
    fgrank: int
    attn: int
    crc32_jpg: int
    crc32_parts: int
    crc32_fgrank: int
    crc32_attn: int


ROW = np.dtype([*zip(Row._fields, ("<u4", "<u4", "<i4", "<u8", *("<u4",) * 8), strict=True)])


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """A shard's index; the columns of class attention only where it is stored."""
    return _without_empty_columns(pa.Table.from_pylist(rows, schema=COLUMNS))


def _without_empty_columns(table: pa.Table) -> pa.Table:
    stored = "attn_offset" in table.column_names and table["attn_offset"].to_numpy().any()
    return table if stored else table.select([name for name in table.column_names if name not in OF_ATTENTION])


def table_bytes(table: pa.Table) -> bytes:
    """The table as Parquet; the same bytes for the same rows and the same pyarrow.

    Offsets grow by little and checksums are noise, so the first are stored as differences and neither in a dictionary.
    """
    growing = ["jpg_offset", *(f"{member}_offset" for member in MEMBERS), "span_end"]
    varied = {"key", "source", "jpg_size", "attn_peak", *growing, *(f"crc32_{member}" for member in ("jpg", *MEMBERS))}
    repeated = [name for name in table.column_names if name not in varied]
    packing = {name: "DELTA_BINARY_PACKED" for name in growing if name in table.column_names}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=PIECE, compression="zstd", use_dictionary=repeated, column_encoding=packing
    )
    return sink.getvalue().to_pybytes()


def merged(tables: Sequence[pa.Table]) -> pa.Table:
    """The shards' tables as one, with the shard of each row.

    Heads' peaks only where all shards with class attention have them: one built again among those of a release that
    stored none must not change the set.
    """
    if any("attn_offset" in table.column_names and "attn_peak" not in table.column_names for table in tables):
        tables = [table.select([name for name in table.column_names if name != "attn_peak"]) for table in tables]
    numbered = [
        table.append_column("shard", pa.array(np.full(table.num_rows, number), pa.uint32()))
        for number, table in enumerate(tables)
    ]
    return pa.concat_tables(numbered, promote_options="default")  # a shard without samples has no class attention


def rows_of_shard(table: pa.Table, first: int, samples: int) -> pa.Table:
    """The index of one shard as it was before it was merged: `samples` rows from the set's `first` on."""
    return _without_empty_columns(table.slice(first, samples).drop_columns(["shard"]).combine_chunks())


def load_rows(path: Path, *, shard: int | None = None) -> Shaped[np.ndarray, " samples"]:
    """What reading needs of an index (`Row`), a piece at a time: memory never holds much more than the result.

    Args:
        shard: The number of a shard, where `path` is its own index, which does not say.
    """
    file = pq.ParquetFile(path, pre_buffer=False)
    rows, start = np.zeros(file.metadata.num_rows, ROW), 0
    rows["shard"] = shard or 0
    members = [member for member in MEMBERS if f"{member}_offset" in file.schema_arrow.names]
    plain = [
        *([] if shard is not None else ["shard"]),
        "key",
        "class_id",
        "jpg_size",
        *(f"crc32_{member}" for member in ("jpg", *members)),
    ]
    offsets = [f"{member}_offset" for member in members]
    for piece in file.iter_batches(PIECE, columns=[*plain, "jpg_offset", *offsets], use_threads=False):
        into = rows[start : start + len(piece)]
        for name in plain:
            into[name] = (pc.cast(piece[name], pa.uint32()) if name == "key" else piece[name]).to_numpy()
        into["begin"] = begin = piece["jpg_offset"].to_numpy()
        for member, offset in zip(members, offsets, strict=True):
            into[member] = piece[offset].to_numpy() - begin
        start += len(piece)
    pa.default_memory_pool().release_unused()
    return rows


def load_peaks(path: Path, heads: int) -> Float32[np.ndarray, "samples heads"] | None:
    """The greatest class attention of each head in each image; None where an earlier release stored none."""
    if "attn_peak" not in pq.read_schema(path).names:
        return None
    peaks = pq.read_table(path, columns=["attn_peak"])["attn_peak"].combine_chunks()
    return None if peaks.null_count else peaks.flatten().to_numpy().reshape(-1, heads)


def read_column(path: Path, name: str) -> list[Any]:
    """A column that training does not need: keys, sources, boxes."""
    return pq.read_table(path, columns=[name])[name].to_pylist()
