"""RowReader: any row of a finished dump, by its index.

A row is one range of one file (two with samples): no footer is parsed and no row group is read.
Tables, of a shard or of the dump, are read once, and kept while they fit. Ranges of a remote dump
go to the cache of this machine, if it has one, once the row that they hold has proved itself.
"""

import os
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from storage import row_head
from storage.cache import RangeCache, Room
from storage.codec.codec import AnyTables, tables_of_row
from storage.data_file import open_local, read_range
from storage.errors import CorruptShard, FormatVersionError
from storage.index import SAMPLES, Index, Place
from storage.kept import Kept
from storage.manifest import Dump, Shard
from storage.own_tables import OWN_TABLES, size_of
from storage.row_head import RowHead
from storage.shard import CODECS, FORMATS
from storage.shard_reader import RowDecoder, gate
from storage.store import cache_folder
from storage.targets import positions_of
from storage.topk import Record

OPEN_FILES = 64
AT_ONCE = 32  # requests to a remote store
PACKED_BYTES = 256 << 20  # of the shards' tables as they are stored
TABLE_BYTES = 256 << 20  # of the tables that rows are decoded with


class Range(NamedTuple):
    """Bytes of a data file, and whether they came from the store."""

    offset: int
    data: bytes
    is_new: bool


class Parts(NamedTuple):
    """A row as it is stored."""

    place: Place
    payload: Range
    samples: Range | None


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
                f"the plan's codec is {self.codec!r}, this release reads {CODECS}; update "
                "mol-distill"
            )
        if len(index.shards) != len(shards):
            raise index.damaged(f"{len(index.shards)} shards, the manifest has {len(shards)}")
        if samples and dump.plan.get("samples", 0) and not index.flags & SAMPLES:
            raise index.damaged("it lacks the samples that the plan says there are")
        self._files: Kept[int] = Kept(OPEN_FILES, os.close)
        self._packed: Kept[Range] = Kept(PACKED_BYTES)
        self._tables: Kept[AnyTables] = Kept(TABLE_BYTES)
        self._caches: Kept[RangeCache] = Kept(OPEN_FILES)
        folder = None if dump.store.local else cache_folder()
        self._room = Room(Path(folder)) if folder else None
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            for handle, _ in self._files.values.values():
                os.close(handle)

    def record(self, number: int, row: int) -> Record:
        """Row `row` of shard `number`."""
        return self.decode(number, row, self.fetch(number, row))

    def records(self, rows: Sequence[tuple[int, int]]) -> list[Record]:
        """Several rows. Those of a remote dump are requested at the same time."""
        if self.dump.store.local or len(rows) < 2:
            return [self.record(*row) for row in rows]
        with ThreadPoolExecutor(min(AT_ONCE, len(rows)), "reading") as pool:
            found = list(pool.map(lambda row: self.fetch(*row), rows))
        return [self.decode(*row, parts) for row, parts in zip(rows, found, strict=True)]

    def fetch(self, number: int, row: int) -> Parts:
        """A row's bytes, not yet looked at. Threads may call this."""
        shard = self.shards[number]
        self.index.check_shard(number, *shard.counts)
        place = self.index.place(number, row, int(shard.marker["bytes"]))
        with gate(f"{shard.file}, row {row}"):
            payload = self.range(number, place.offset, place.size)
            samples = None
            if self.samples and place.samples is not None:
                samples = self.range(number, *place.samples)
        return Parts(place, payload, samples)

    def decode(self, number: int, row: int, parts: Parts) -> Record:
        """The row of these bytes, which then go to the cache."""
        shard, place, payload = self.shards[number], parts.place, parts.payload.data
        with gate(f"{shard.file}, row {row}"):
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
            if decoder.has_samples and parts.samples is not None:
                samples = parts.samples.data
                if zlib.crc32(samples) != head.samples_crc:
                    raise CorruptShard("the checksum of the samples is not the row's")
            tables = self.tables(number)
            ready = tables_of_row(tables, head.input_ids, head.targets)
            topk = decoder.decode(payload, samples, learnt, ready)
        for part in (parts.payload, parts.samples):
            self.keep(number, part)
        return Record(head.doc_id, head.chunk, head.input_ids, topk, head.targets)

    def tables(self, number: int) -> AnyTables:
        """The tables of a shard, read once while they are kept."""
        shared = self.shards[number].tables
        if shared is not None:
            return self.dump.tables.get(shared)
        offset, size = self.index.tables(number, int(self.shards[number].marker["bytes"]))
        vocab_size = int(self.dump.plan["vocab_size"])

        def read() -> Range:
            return self.range(number, offset, size)

        def unpack() -> AnyTables:
            packed = self._packed.get(number, read, lambda found: len(found.data))
            tables = OWN_TABLES[self.codec].unpack(packed.data, vocab_size)
            self.keep(number, packed)
            return tables

        return self._tables.get(number, unpack, size_of)

    def range(self, number: int, offset: int, size: int) -> Range:
        """A range of a shard's data file, which has it. Raises CorruptShard and StoreError."""
        store, shard = self.dump.store, self.shards[number]
        if store.local:
            handle = self._files.get(number, lambda: open_local(store, shard), lambda _: 1)
            with store.explaining("read", shard.file):
                data = os.pread(handle, size, offset)
        else:
            cache = self.cache(number)
            kept = cache.get(offset, size) if cache else None
            if kept is None:
                return Range(offset, read_range(store, shard, offset, size), True)
            data = kept
        if len(data) != size:
            raise CorruptShard(f"cut short: {len(data)} of {size} bytes at {offset}")
        return Range(offset, data, False)

    def cache(self, number: int) -> RangeCache | None:
        """The cached ranges of a shard; None without a cache."""
        room, sha256 = self._room, str(self.shards[number].marker["sha256"])
        if room is None:
            return None
        with self._lock:
            return self._caches.get(number, lambda: RangeCache(room, sha256), lambda _: 1)

    def keep(self, number: int, part: Range | None) -> None:
        """Put a range into the cache, if it is not from there."""
        cache = self.cache(number) if part and part.is_new else None
        if part and cache:
            cache.put(part.offset, part.data)
