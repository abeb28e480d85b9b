"""RowReader: any row of a finished dump, by its index.

A row is one range of one file (two with samples): no footer is parsed and no row group is read. The
tables of a shard are read once, and kept while they fit.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from storage import row_head
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import Successors, tables_of_row
from storage.data_file import open_local, read_range
from storage.errors import CorruptShard, FormatVersionError
from storage.index import SAMPLES, Index
from storage.manifest import Dump, Shard
from storage.row_head import RowHead
from storage.shard import FORMATS, unpack_ranks
from storage.shard_reader import RowDecoder, gate
from storage.store import cache_folder
from storage.targets import positions_of
from storage.topk import Record

OPEN_FILES = 64
PACKED_BYTES = 256 << 20  # of the shards' tables as they are stored
TABLE_BYTES = 256 << 20  # of the tables that rows are decoded with

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The values used last, up to a total size; `drop` gets each that is given up."""

    def __init__(self, most: int, drop: Callable[[Value], object] = lambda value: None) -> None:
        self.most, self.drop, self.total = most, drop, 0
        self.values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value], size: Callable[[Value], int]) -> Value:
        """The value of a key, made if it is not kept."""
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key][0]
        value = make()
        self.values[key] = value, size(value)
        self.total += self.values[key][1]
        while self.total > self.most and len(self.values) > 1:
            _, (old, length) = self.values.popitem(last=False)
            self.total -= length
            self.drop(old)
        return value


class RowReader:
    """Reads rows of a dump by the number of their shard and their number in it.

    Raises CorruptShard that names file and row, CorruptIndex, FormatVersionError and StoreError.
    Positions in files are not shared, so forked processes may use one.
    """

    def __init__(self, dump: Dump, index: Index, shards: tuple[Shard, ...], samples: bool) -> None:
        self.dump, self.index, self.shards, self.samples = dump, index, shards, samples
        self.codec = str(dump.plan.get("codec", "v1"))
        if self.codec not in FORMATS.values():
            raise FormatVersionError(
                f"the plan's codec is {self.codec!r}, this release reads v1 and v2; update "
                "mol-distill"
            )
        if len(index.shards) != len(shards):
            raise index.damaged(f"{len(index.shards)} shards, the manifest has {len(shards)}")
        if samples and dump.plan.get("samples", 0) and not index.flags & SAMPLES:
            raise index.damaged("it lacks the samples that the plan says there are")
        self._files: Kept[int] = Kept(OPEN_FILES, os.close)
        self._packed: Kept[bytes] = Kept(PACKED_BYTES)
        self._tables: Kept[Ranks | Successors] = Kept(TABLE_BYTES)

    def __del__(self) -> None:
        for handle, _ in getattr(self, "_files", Kept[int](0)).values.values():
            os.close(handle)

    def record(self, number: int, row: int) -> Record:
        """Row `row` of shard `number`."""
        shard = self.shards[number]
        self.index.check_shard(number, *shard.counts)
        size = int(shard.marker["bytes"])
        place = self.index.place(number, row, size)
        with gate(f"{shard.file}, row {row}"):
            payload = self.bytes_of(number, shard, place.offset, place.size)
            if place.head is None:
                head = row_head.find(payload)
            else:
                head = RowHead.unpack(place.head, b"", payload)
            if head is None:
                raise CorruptShard(
                    f"no row is at {place.offset}: the file is damaged, or its index is of another"
                )
            head.check(shard.name, row, self.dump.plan_sha256, place.tokens)
        with gate(f"{shard.file}, row {row} (document {head.doc_id!r}, chunk {head.chunk})"):
            decoder = RowDecoder(shard, self.dump.plan, self.samples)
            decoder.check(head.input_ids, place.tokens, head.targets)
            learnt = len(positions_of(head.targets, place.tokens))
            if head.targets is not None and learnt != place.targets:
                raise self.index.damaged(f"{place.targets} targets, the row's mask has {learnt}")
            samples = None
            if decoder.has_samples and place.samples is not None:
                samples = self.bytes_of(number, shard, *place.samples)
                if zlib.crc32(samples) != head.samples_crc:
                    raise CorruptShard("the checksum of the samples is not the row's")
            tables = self.tables(number, shard)
            ready = tables_of_row(tables, head.input_ids, head.targets)
            topk = decoder.decode(payload, samples, learnt, ready)
        return Record(head.doc_id, head.chunk, head.input_ids, topk, head.targets)

    def tables(self, number: int, shard: Shard) -> Ranks | Successors:
        """The tables of a shard, read once while they are kept."""
        offset, size = self.index.tables(number, int(shard.marker["bytes"]))
        vocab_size = int(self.dump.plan["vocab_size"])

        def read() -> bytes:
            return self.bytes_of(number, shard, offset, size)

        def unpack() -> Ranks | Successors:
            packed = self._packed.get(number, read, len)
            if self.codec == "v1":
                return unpack_ranks(packed, vocab_size)
            return Successors.unpack(packed, vocab_size)

        return self._tables.get(number, unpack, size_of)

    def bytes_of(self, number: int, shard: Shard, offset: int, size: int) -> bytes:
        """A range of a shard's data file, which has it. Raises CorruptShard and StoreError."""
        store = self.dump.store
        if not store.local and not cache_folder():
            return read_range(store, shard, offset, size)
        handle = self._files.get(number, lambda: open_local(store, shard), lambda _: 1)
        with store.explaining("read", shard.file):
            data = os.pread(handle, size, offset)
        if len(data) != size:
            raise CorruptShard(f"cut short: {len(data)} of {size} bytes at {offset}")
        return data


def size_of(tables: Ranks | Successors) -> int:
    """Bytes of tables in memory."""
    ranks = tables if isinstance(tables, Ranks) else tables.ranks
    if isinstance(tables, Ranks):
        return int(ranks.order.nbytes)
    arrays = (tables.starts, tables.listed, tables.kinds, tables.rank_kinds, tables.sums)
    return sum(int(array.nbytes) for array in (ranks.order, ranks.rank_of, *arrays))
