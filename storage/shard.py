"""Schema, format names and footer of a Parquet data file, shared by its writer and its reader."""

import zlib
from typing import Any

import pyarrow as pa

from storage.errors import CorruptShard
from storage.parsing import Json
from storage.plan import masked

SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("chunk", pa.int32(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        pa.field("payload", pa.binary(), nullable=False),
    ]
)
TARGETS = pa.field("targets", pa.binary(), nullable=False)  # only if the plan has targets
SUCCESSORS = pa.field("successors", pa.binary())  # version 2's tables: one value, in the first row
SAMPLES = pa.field("samples", pa.binary(), nullable=False)  # only if the plan has samples
FORMATS = {b"mol-topk/1": "v1", b"mol-topk/2": "v2", b"mol-topk/3": "v3"}
CODECS = ", ".join(FORMATS.values())


def schema_of(plan: Json) -> pa.Schema:
    """The columns of the data files of a dump with this plan."""
    optional = [
        (TARGETS, masked(plan)),
        (SAMPLES, plan.get("samples", 0) > 0),
        (SUCCESSORS, plan.get("codec", "v1") == "v2"),
    ]
    return pa.schema([*SCHEMA, *(field for field, there in optional if there)])


def footer_crc32(file: Any) -> int:
    """CRC-32 of a Parquet file's footer, which Parquet does not checksum."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little") + 8
    if length > size:
        raise CorruptShard(f"the footer claims {length} bytes, the file has {size}")
    file.seek(size - length)
    return zlib.crc32(file.read(length))
