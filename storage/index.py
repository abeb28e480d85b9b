"""The index of a dump: where each row lies in its shard, how many tokens and targets it has.

One layout for a shard and for a dump, which joins those of its shards. It is memory-mapped; only
the header and the table of shards are read at opening. FORMAT.md is the specification.

An index is derived data: it can be made again from the shards. Checksums find damage. Nothing in it
is trusted: ranges are checked against the file, and a row proves itself with its head.
"""

import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.errors import CorruptIndex, FormatVersionError
from storage.store import mapped
from storage.topk import Int32s

MAGIC, VERSION = b"MoLindex", 1
# magic, version, flags, shards, rows, bytes of all heads, key, plan; CRC-32 of the table of shards,
# of the tokens and targets, and of the header before it
HEADER = struct.Struct("<8sIIQQQ32s32sII4xI")
SAMPLES, HEADS = 1, 2  # flags: what else an entry has
TARGETS = 4  # flag: the targets of all rows follow their tokens
SHARD = np.dtype([("start", "<u8"), ("tables", "<u8"), ("tables_size", "<u4"), ("crc32", "<u4")])
PARTS = (("offset", "<u8"), ("size", "<u4"))  # of an entry, once, twice or three times
ROW, SAMPLE = ("offset", "size"), ("samples_offset", "samples_size")
Entries = npt.NDArray[np.void]


class Place(NamedTuple):
    """Where the parts of a row lie: offsets and bytes in its data file; the head, if not there.

    targets  learnt tokens; all tokens where the dump has no masks
    """

    tokens: int
    offset: int
    size: int
    samples: tuple[int, int] | None
    head: bytes | None
    targets: int


def entry_type(flags: int) -> np.dtype[np.void]:
    """The type of a row's entry."""
    names = ["", *(["samples_"] if flags & SAMPLES else []), *(["head_"] if flags & HEADS else [])]
    return np.dtype([(f"{n}{what}", kind) for n in names for what, kind in PARTS])


class Index:
    """An index in memory, or mapped from a file.

    `key` is the sha256 of what is indexed: manifest.json or, for a shard, its data file. Raises
    CorruptIndex and FormatVersionError.
    """

    def __init__(self, data: bytes | mmap.mmap, name: str, key: str, plan_sha256: str) -> None:
        self.data, self.name, self.key, self.plan_sha256 = data, name, key, plan_sha256
        if len(data) < HEADER.size or data[:8] != MAGIC:
            raise self.damaged(f"{len(data)} bytes that start with {data[:8]!r}, not an index")
        _, version, self.flags, shards, self.rows, heads, *hashes, table, self.tokens_crc, crc = (
            HEADER.unpack_from(data)
        )
        if version != VERSION:
            raise FormatVersionError(
                f"{name}: index of version {version}, this release reads version {VERSION}; update "
                "mol-distill, or remove the file: the dump can be read without it"
            )
        if zlib.crc32(data[: HEADER.size - 4]) != crc:
            raise self.damaged("the header's checksum does not match")
        kind, columns = entry_type(self.flags), 2 if self.flags & TARGETS else 1
        ends = np.cumsum(  # Python's integers: no claim overflows
            np.array(
                [HEADER.size, shards * SHARD.itemsize, 4 * columns * self.rows,
                 kind.itemsize * self.rows, heads], object,
            )
        ).tolist()  # fmt: skip
        if self.flags > SAMPLES | HEADS | TARGETS or ends[-1] != len(data):
            raise self.damaged(
                f"expected {ends[-1]} bytes for {shards} shards and {self.rows} rows, found "
                f"{len(data)}"
            )
        if hashes != [bytes.fromhex(key), bytes.fromhex(plan_sha256)]:
            raise self.damaged("it belongs to another dump")
        self.shards = np.frombuffer(data, SHARD, shards, ends[0])
        counts = np.frombuffer(data, "<i4", columns * self.rows, ends[1])
        self._counts = counts.reshape(columns, self.rows)
        self.entries: Entries = np.frombuffer(data, kind, self.rows, ends[2])
        self.heads_at, self.heads_size = ends[3], heads
        if zlib.crc32(self.shards.tobytes()) != table:
            raise self.damaged("the checksum of the table of shards does not match")
        starts = np.append(self.shards["start"], np.uint64(self.rows))
        if (starts[1:] < starts[:-1]).any() or starts[0] != 0 or starts[-1] > self.rows:
            raise self.damaged("the rows of its shards are not in order")
        self.starts = starts.astype(np.int64)  # [shards + 1]
        self._checked: set[int] = set()
        self._good: Int32s | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], name: str, key: str, plan_sha256: str) -> "Index":
        """Map a local file. Raises FileNotFoundError, OSError, and as the class."""
        return cls(mapped(path), name, key, plan_sha256)

    def damaged(self, what: str) -> CorruptIndex:
        return CorruptIndex(
            f"{self.name}: {what}; remove the file, which holds no data: `python -m storage index "
            "DUMP` makes it again, and `python -m storage verify DUMP` checks the rest"
        )

    @property
    def masked(self) -> bool:
        """Whether it has the targets of rows."""
        return len(self._counts) == 2

    @property
    def counts(self) -> Int32s:
        """int32 [1 or 2, rows]: tokens of each row and, if `masked`, its targets; read-only."""
        if self._good is None:
            found = self._counts
            wrong = (found < 1).any() or (found[1:] >= found[0]).any()
            if zlib.crc32(found.data) != self.tokens_crc or wrong:
                raise self.damaged("the checksum of the tokens does not match")
            self._good = found.astype(np.int32, copy=False)
        return self._good

    @property
    def lengths(self) -> Int32s:
        """int32 [rows]: tokens of each row; read-only."""
        return np.asarray(self.counts[0])

    @property
    def target_counts(self) -> Int32s:
        """int32 [rows]: targets of each row; all its tokens without masks. Read-only."""
        return np.asarray(self.counts[-1])

    def check_shard(self, number: int, *expected: int) -> None:
        """Raise CorruptIndex unless the entries of a shard are whole, and as its marker says.

        `expected` are its rows and tokens and, with masks, its positions.
        """
        if number in self._checked:
            return
        here = slice(int(self.starts[number]), int(self.starts[number + 1]))
        sums = self.counts[:, here].sum(axis=1, dtype=np.int64).tolist()
        found = (here.stop - here.start, *sums)
        if found != expected:
            raise self.damaged(
                f"{totals(found)} in shard {number}, its marker says {totals(expected)}"
            )
        if zlib.crc32(self.entries[here].tobytes()) != int(self.shards["crc32"][number]):
            raise self.damaged(f"the checksum of shard {number} does not match")
        self._checked.add(number)

    def tables(self, number: int, size: int) -> tuple[int, int]:
        """Offset and bytes of a shard's tables in its data file of `size` bytes."""
        found = self.shards[number]
        return self.within(int(found["tables"]), int(found["tables_size"]), size, "the tables")

    def place(self, number: int, row: int, size: int) -> Place:
        """Where row `row` of a shard lies, whose data file has `size` bytes; see check_shard."""
        at = int(self.starts[number]) + row
        entry = self.entries[at]
        offset, length = self.part(entry, "", size, at)
        samples = self.part(entry, "samples_", size, at) if self.flags & SAMPLES else None
        head = None
        if self.flags & HEADS and int(entry["head_size"]):
            start, extent = self.part(entry, "head_", self.heads_size, at)
            head = self.data[self.heads_at + start : self.heads_at + start + extent]
        tokens, *targets = self._counts[:, at].tolist()
        return Place(tokens, offset, length, samples, head, *(targets or [tokens]))

    def part(self, entry: Any, name: str, size: int, row: int) -> tuple[int, int]:
        found = int(entry[f"{name}offset"]), int(entry[f"{name}size"])
        return self.within(*found, size, f"row {row}")

    def within(self, offset: int, length: int, size: int, what: str) -> tuple[int, int]:
        """A range, if a file of `size` bytes has it."""
        if offset + length > size:
            raise self.damaged(f"{what} would be at {offset} to {offset + length}, in {size} bytes")
        return offset, length


def totals(counts: Sequence[int]) -> str:
    """Rows, tokens and perhaps targets in words."""
    names = ("rows", "tokens", "targets")
    return ", ".join(f"{n} {name}" for n, name in zip(counts, names, strict=False))


class Part(NamedTuple):
    """What an index says of one shard: tokens [rows], entries [rows], offset and bytes of the
    tables, the heads that its entries count from, and targets [rows], if its rows have masks."""

    tokens: Int32s
    entries: Entries
    tables: tuple[int, int]
    heads: bytes = b""
    targets: Int32s | None = None

    @property
    def counts(self) -> Int32s:
        """As those of an index."""
        return np.stack([self.tokens] if self.targets is None else [self.tokens, self.targets])


def parts_of(index: Index) -> list[Part]:
    """The shards of an index, as pack_index takes them.

    Raises CorruptIndex for damaged entries, and for several shards whose heads are in the index.
    """
    return [part_of(index, number) for number in range(len(index.shards))]


def part_of(index: Index, number: int) -> Part:
    """One of the shards of an index."""
    here, table = slice(*index.starts[number : number + 2].tolist()), index.shards[number]
    heads = index.data[index.heads_at : index.heads_at + index.heads_size]
    if heads and len(index.shards) > 1:
        raise index.damaged("the heads of several shards, which no writer keeps apart")
    entries = index.entries[here]
    if zlib.crc32(entries.tobytes()) != int(table["crc32"]):
        raise index.damaged(f"the checksum of shard {number} does not match")
    targets = index.target_counts[here] if index.masked else None
    tables = int(table["tables"]), int(table["tables_size"])
    return Part(index.lengths[here], entries, tables, heads, targets)


def agrees(index: Index, number: int, part: Part) -> bool:
    """Whether an index says of one of its shards what this part says; heads may lie in either."""
    here = slice(int(index.starts[number]), int(index.starts[number + 1]))
    table, entries = index.shards[number], index.entries[here]
    names = {name for name in (*ROW, *SAMPLE) if name in (entries.dtype.names or ())}
    return (
        (int(table["tables"]), int(table["tables_size"])) == part.tables
        and np.array_equal(index.counts[:, here], part.counts)
        and names == {n for n in (*ROW, *SAMPLE) if n in (part.entries.dtype.names or ())}
        and all(np.array_equal(entries[name], part.entries[name]) for name in names)
    )


def entries_of(
    offsets: Sequence[int],
    sizes: Sequence[int],
    samples: tuple[Sequence[int], Sequence[int]] | None = None,
    heads: Sequence[int] | None = None,
) -> Entries:
    """Entries [rows]; `samples` are offsets and sizes, `heads` the sizes of adjoining heads."""
    flags = (SAMPLES if samples is not None else 0) | (HEADS if heads is not None else 0)
    entries = np.zeros(len(offsets), entry_type(flags))
    entries["offset"], entries["size"] = offsets, sizes
    if samples is not None:
        entries["samples_offset"], entries["samples_size"] = samples
    if heads is not None:
        entries["head_offset"] = np.cumsum([0, *heads])[:-1]
        entries["head_size"] = heads
    return entries


def pack_index(parts: Sequence[Part], key: str, plan_sha256: str) -> bytes:
    """The bytes of an index over these shards, in order: all with masks, or none."""
    names = {name for part in parts for name in part.entries.dtype.names or ()}
    flags = (SAMPLES if "samples_size" in names else 0) | (HEADS if "head_size" in names else 0)
    table, found, heads_at, start = np.zeros(len(parts), SHARD), [], 0, 0
    for number, part in enumerate(parts):
        entries = np.zeros(len(part.entries), entry_type(flags))
        for name in part.entries.dtype.names or ():
            entries[name] = part.entries[name]
        if flags & HEADS:
            entries["head_offset"] += np.uint64(heads_at)
        table[number] = (start, *part.tables, zlib.crc32(entries.tobytes()))
        found.append(entries.tobytes())
        start, heads_at = start + len(entries), heads_at + len(part.heads)
    masks = [part.targets for part in parts if part.targets is not None]
    flags |= TARGETS if masks else 0
    counts = [*(part.tokens for part in parts), *masks]
    tokens = b"".join(count.astype("<i4").tobytes() for count in counts)
    hashes = bytes.fromhex(key), bytes.fromhex(plan_sha256)
    crcs = zlib.crc32(table.tobytes()), zlib.crc32(tokens)
    numbers = (VERSION, flags, len(parts), start, heads_at)
    header = HEADER.pack(MAGIC, *numbers, *hashes, *crcs, 0)[:-4]
    header += struct.pack("<I", zlib.crc32(header))
    return b"".join([header, table.tobytes(), tokens, *found, *(part.heads for part in parts)])
