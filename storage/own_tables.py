"""The tables that a data file holds itself, and how a shard comes by them.

    v1  ranks of the ids, in the footer, learnt from the first row group
    v2  successors, in a column of the first row, learnt from the whole shard

Version 3 has tables that many shards share, see dump_tables.py and shared_tables.py.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow.parquet as pq
import zstandard

from storage.codec.codec import AnyTables
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import Successors
from storage.codec.v3_tables import Tables
from storage.errors import CorruptPayload
from storage.parsing import Json
from storage.pending_row import PendingRow, learning


class Chosen(NamedTuple):
    """The tables of a shard, and where its writer puts what decodes them.

    tables    that encode its rows; None for a shard without rows
    metadata  of the data file
    value     of the column `successors` in the first row; None without such a column
    marker    entries of the shard's marker
    """

    tables: AnyTables | None
    metadata: dict[str, bytes]
    value: bytes | None
    marker: Json


class Chooser(Protocol):
    """Decides with which tables the rows of one shard are encoded."""

    def choose(self, rows: Sequence[PendingRow], size: int, last: bool) -> Chosen | None:
        """The choice, from the first rows of a shard; None to wait for more of them.

        `size` is that of the rows in learnt tokens, see ShardWriter.learnt; `last` says that no
        more rows follow.
        """


class FirstRows:
    """Version 1: ranks by how often the first rows keep an id."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def choose(self, rows: Sequence[PendingRow], size: int, last: bool) -> Chosen:
        given, _ = learning(rows)
        ranks = Ranks.learn((grid for _, grid in given), self.vocab_size)
        return Chosen(ranks, {"ranks": pack_ranks(ranks)}, None, {})


class AllRows:
    """Version 2: successors in the whole shard."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def choose(self, rows: Sequence[PendingRow], size: int, last: bool) -> Chosen | None:
        if not last:
            return None
        given, masks = learning(rows)
        found = Successors.learn(given, self.vocab_size, masks)
        return Chosen(found, {}, found.pack() if rows else b"", {})


class OwnTables(NamedTuple):
    """How the tables of a codec are found in an open data file, and unpacked."""

    packed: Callable[[pq.ParquetFile], bytes]
    unpack: Callable[[bytes, int], AnyTables]


def in_footer(file: pq.ParquetFile) -> bytes:
    """Version 1's tables, packed."""
    value: bytes = (file.metadata.metadata or {}).get(b"ranks", b"")
    return value


def in_first_row(file: pq.ParquetFile) -> bytes:
    """Version 2's tables, packed; empty without rows."""
    if not file.metadata.num_rows:
        return b""
    return file.read_row_group(0, columns=["successors"]).column(0)[0].as_py() or b""


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


OWN_TABLES = {
    "v1": OwnTables(in_footer, unpack_ranks),
    "v2": OwnTables(in_first_row, Successors.unpack),
}


def size_of(tables: AnyTables) -> int:
    """Bytes of tables in memory."""
    if isinstance(tables, Tables):
        return tables.nbytes
    if isinstance(tables, Ranks):
        return int(tables.order.nbytes)
    arrays = (tables.starts, tables.listed, tables.kinds, tables.rank_kinds, tables.sums)
    ranks = tables.ranks.order, tables.ranks.rank_of
    return sum(int(array.nbytes) for array in (*ranks, *arrays))
