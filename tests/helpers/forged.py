"""Dumps as a hostile writer makes them: anything changed, and every checksum right again."""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import index, row_head
from storage.parsing import to_json
from storage.shard_writer import footer_of, sha256_of

Change = Callable[[pa.Table], pa.Table]


def read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def seal(
    path: Path,
    plan: dict[str, Any] | None = None,
    marker: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
) -> None:
    """Make the hashes, sizes and rows of all markers right, then apply these changes."""
    there = {**read_json(path / "plan.json"), **(plan or {})}
    (path / "plan.json").write_bytes(to_json(there))
    whole = read_json(path / "manifest.json")
    for number, entry in enumerate(whole["shards"]):
        name = entry["name"]
        found = read_json(path / f"{name}.json")
        file = path / name.split("/")[0] / found["file"]
        found |= {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        found |= {"footer_crc32": footer_of(file)}
        found |= marker or {}
        (path / f"{name}.json").write_bytes(to_json(found))
        whole["shards"][number] = {"name": name, **found}
    whole["plan_sha256"] = hashlib.sha256(to_json(there)).hexdigest()
    (path / "manifest.json").write_bytes(to_json({**whole, **(manifest or {})}))
    for file in path.glob("*/*.index"):  # derived, and of what was there before
        file.unlink()


def strip(payload: bytes) -> bytes:
    """The payload without its head, as releases before wrote it."""
    start, end = row_head.first_part(payload)
    (size,) = struct.unpack_from("<I", payload, end - 8)
    if end > len(payload) or payload[end - size - 8 : end - size - 4] != row_head.SKIPPABLE:
        return payload
    length = struct.pack("<I", end - start - size - 8)
    found = payload[:44] + length + payload[48 : end - size - 8] + payload[end:]
    return found[:-4] + struct.pack("<I", zlib.crc32(found[:-4])) if found[4] == 2 else found


def as_before(path: Path) -> None:
    """Turn a dump into one of a release that wrote neither heads nor indexes."""
    for file in [*path.glob("*.index"), *path.glob("*/*.index")]:
        file.unlink()
    for file in path.glob("*/*.json"):
        if file.name != "complete.json":
            compression = {"payload": "none", "samples": "none", "successors": "none"}
            names = pq.read_schema(data_file(path, f"{file.parent.name}/{file.stem}")).names
            own = {name: compression.get(name, "zstd") for name in names}
            own["input_ids.list.element"] = own.pop("input_ids")
            rewrite(path, name=f"{file.parent.name}/{file.stem}", compression=own)


def index_file(path: Path) -> Path:
    """The index of a finished dump."""
    (file,) = path.glob("rows-*.index")
    return file


def seal_index(data: bytes) -> bytes:
    """An index of changed bytes with its checksums right: the header's alone if it claims more."""
    _, version, flags, shards, rows, heads, key, plan, *_ = index.HEADER.unpack_from(data)
    table_at = index.HEADER.size
    tokens_at = table_at + index.SHARD.itemsize * shards
    entries_at = tokens_at + 4 * rows * (2 if flags & index.TARGETS else 1)
    kind, crcs, body = index.entry_type(flags % 4), (0, 0), data[table_at:]
    if entries_at + kind.itemsize * rows <= len(data):
        table = np.frombuffer(data, index.SHARD, shards, table_at).copy()
        entries = np.frombuffer(data, kind, rows, entries_at)
        for here, stop in zip(table, [*table["start"][1:].tolist(), rows], strict=True):
            here["crc32"] = zlib.crc32(entries[int(here["start"]) : int(stop)].tobytes())
        crcs = zlib.crc32(table.tobytes()), zlib.crc32(data[tokens_at:entries_at])
        body = table.tobytes() + data[tokens_at:]
    numbers = (version, flags, shards, rows, heads)
    head = index.HEADER.pack(index.MAGIC, *numbers, key, plan, *crcs, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + body


def data_file(path: Path, name: str = "00000/00000") -> Path:
    return path / name.split("/")[0] / read_json(path / f"{name}.json")["file"]


def replan(path: Path, plan: dict[str, Any]) -> None:
    """Give a finished dump this plan, in every place that names the plan."""
    (path / "plan.json").write_bytes(to_json(plan))
    digest = hashlib.sha256(to_json(plan)).hexdigest().encode()
    shards = read_json(path / "manifest.json")["shards"]
    rows = {shard["name"]: shard["rows"] for shard in shards}
    for name in rows:
        rewrite(path, metadata={b"plan_sha256": digest}, name=name)
    for name, number in rows.items():
        marker = read_json(path / f"{name}.json")
        (path / f"{name}.json").write_bytes(to_json({**marker, "rows": number}))
    seal(path)


def rewrite(
    path: Path,
    change: Change | None = None,
    metadata: dict[bytes, bytes | None] | None = None,
    marker: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    name: str = "00000/00000",
    **options: Any,
) -> None:
    """Change the table and the metadata of a shard, and drop the heads; None removes a key."""
    file = data_file(path, name)
    with pq.ParquetFile(file) as source:
        table, kept = source.read(), dict(source.metadata.metadata)
    if table.schema.field("payload").type == pa.binary():
        table = with_column("payload", lambda column: pa.array(map(strip, column.to_pylist())))(
            table
        )
    table = table if change is None else change(table)
    if plan is not None:
        there = {**read_json(path / "plan.json"), **plan}
        kept[b"plan_sha256"] = hashlib.sha256(to_json(there)).hexdigest().encode()
    for key, value in (metadata or {}).items():
        kept[key] = value
    given = {
        "compression": "zstd", "use_dictionary": False, "write_statistics": False,
        "write_page_checksum": True, "store_schema": False, **options,
    }  # fmt: skip
    rows = given.pop("row_group_size", None)
    table = table.replace_schema_metadata(None)
    with pq.ParquetWriter(file, table.schema, **given) as writer:
        writer.write_table(table, row_group_size=rows)
        writer.add_key_value_metadata({k: v for k, v in kept.items() if v is not None})
    seal(path, plan, {"rows": len(table), **(marker or {})} if change or marker else None)


def with_column(name: str, make: Callable[[pa.ChunkedArray], Any]) -> Change:
    """Replace a column of the table."""

    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.names.index(name), name, make(table.column(name)))

    return change


def cast(name: str, kind: pa.DataType) -> Change:
    return with_column(name, lambda column: column.cast(kind))


def first_is(name: str, value: Any, kind: pa.DataType | None = None) -> Change:
    """The first row of a column becomes `value`."""
    return with_column(
        name, lambda column: pa.array([value, *column.to_pylist()[1:]], kind or column.type)
    )


def not_text(column: pa.ChunkedArray) -> pa.Array:
    """Strings that are not UTF-8."""
    values = pa.array([b"\xff\xfe"] * len(column), pa.binary())
    return pa.StringArray.from_buffers(len(column), *values.buffers()[1:])


def twice(table: pa.Table) -> pa.Table:
    return table.append_column("payload", table.column("payload"))


def structs(column: pa.ChunkedArray) -> pa.Array:
    return pa.StructArray.from_arrays([column.combine_chunks()], ["x"])


NULL_IDS = pa.list_(pa.int32())
# Shape -> how the table is changed, and the options it is written with
SHAPES: dict[str, tuple[Change | None, dict[str, Any]]] = {
    "as it is": (None, {}),
    "no rows": (lambda table: table.slice(0, 0), {}),
    "a row fewer": (lambda table: table.slice(1), {}),
    "a row twice": (lambda table: pa.concat_tables([table, table.slice(0, 1)]), {}),
    "a column more": (lambda t: t.append_column("x", pa.array(range(len(t)))), {}),
    "payload twice": (twice, {}),
    "columns in another order": (lambda table: table.select(table.column_names[::-1]), {}),
    **{
        f"no {name}": (lambda table, name=name: table.drop_columns([name]), {})
        for name in ("doc_id", "chunk", "tokens", "input_ids", "payload")
    },
    "doc_id a number": (with_column("doc_id", lambda c: pa.array(range(len(c)))), {}),
    "doc_id binary": (cast("doc_id", pa.binary()), {}),
    "doc_id null": (first_is("doc_id", None), {}),
    "doc_id not UTF-8": (with_column("doc_id", not_text), {}),
    "chunk a float": (cast("chunk", pa.float64()), {}),
    "chunk null": (first_is("chunk", None), {}),
    "tokens int64": (cast("tokens", pa.int64()), {}),
    "tokens null": (first_is("tokens", None), {}),
    "tokens negative": (first_is("tokens", -20), {}),
    "tokens too many": (first_is("tokens", 1 << 30), {}),
    "input_ids int64": (cast("input_ids", pa.list_(pa.int64())), {}),
    "input_ids floats": (cast("input_ids", pa.list_(pa.float32())), {}),
    "input_ids null": (first_is("input_ids", None, NULL_IDS), {}),
    "input_ids with a null": (first_is("input_ids", [1, None] * 10, NULL_IDS), {}),
    "input_ids empty": (first_is("input_ids", [], NULL_IDS), {}),
    "input_ids outside": (first_is("input_ids", [10**9, -7] * 10, NULL_IDS), {}),
    "input_ids lists of lists": (with_column("input_ids", lambda c: pa.array(
        [[ids] for ids in c.to_pylist()], pa.list_(pa.list_(pa.int32())))), {}),
    "payload text": (with_column("payload", lambda c: pa.array(["x"] * len(c))), {}),
    "payload a struct": (with_column("payload", structs), {}),
    "payload null": (first_is("payload", None), {}),
    "payload empty": (first_is("payload", b""), {}),
    "a row per row group": (None, {"row_group_size": 1}),
    "dictionaries": (None, {"use_dictionary": True}),
    "other encodings": (None, {"column_encoding": {"chunk": "DELTA_BINARY_PACKED"}}),
    "not compressed": (None, {"compression": "none"}),
    "pages of version 2": (None, {"data_page_version": "2.0"}),
    "no page checksums": (None, {"write_page_checksum": False}),
}  # fmt: skip


def zeros(column: pa.ChunkedArray, length: int) -> pa.Array:
    """Lists of zeros, the first one `length` long."""
    offsets = [0, *range(length, length + len(column))]
    values = np.zeros(offsets[-1], np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
