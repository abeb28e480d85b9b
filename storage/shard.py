"""Schema, format names and footer of a Parquet data file, shared by its writer and its reader."""

import struct
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from storage.codec.v1 import Ranks
from storage.errors import CorruptPayload, CorruptShard
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
FORMATS = {b"mol-topk/1": "v1", b"mol-topk/2": "v2"}


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


def pack_ranks(ranks: Ranks) -> bytes:
    """In hexadecimal, because most readers take Parquet's key-value metadata for text."""
    packed = zstandard.ZstdCompressor(level=19).compress(ranks.frequent.astype("<i4").tobytes())
    return (struct.pack("<I", ranks.vocab_size) + packed).hex().encode()


def unpack_ranks(value: bytes, expected: int) -> Ranks:
    """The inverse of pack_ranks, for a vocabulary of `expected` ids. Raises CorruptPayload."""
    try:
        raw = bytes.fromhex(value.decode())
        (vocab_size,) = struct.unpack("<I", raw[:4])
        if vocab_size != expected:
            raise CorruptPayload(
                f"rank table for a vocabulary of {vocab_size} ids, the plan says {expected}"
            )
        size = zstandard.frame_content_size(raw[4:])
        if not 0 <= size <= 4 * vocab_size:
            raise CorruptPayload(f"rank table of {size} bytes for a vocabulary of {vocab_size}")
        frequent = zstandard.ZstdDecompressor().decompress(raw[4:], max_output_size=size)
        return Ranks(np.frombuffer(frequent, "<i4"), vocab_size)
    except (ValueError, struct.error, zstandard.ZstdError) as error:
        raise CorruptPayload(f"rank table in the footer is damaged: {error}") from None
