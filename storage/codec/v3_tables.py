"""The tables of version 3: ids kept after each token, and how likely each symbol is.

They are learnt once (v3_learning) and serve many shards. All that decodes is integers.
"""

import struct
import zlib
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from storage.codec.frames import inflate, split_planes
from storage.codec.root_grid import RootGrid, largest
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import (
    checksum_of_row,
    from_planes,
    positions_within,
    unpack_lists,
)
from storage.errors import CorruptPayload, FormatVersionError, StorageError
from storage.targets import Bools, Int64s
from storage.topk import Int32s, UInt16s

MAGIC, VERSION = b"MoLt", 1
# magic, version, V, frequent ids, listed, positions learnt from, bits an entry, edges of classes of
# positions and of roots, bytes of each compressed part
HEAD = struct.Struct("<4sIIIIQd7Q4Q5I")
PACKING = 15  # level of zstd; 19 takes thrice the time and saves 1 % of the tables
MOST_LISTED_PER_BYTE, FREE_LISTED = 64, 1 << 20  # a table's claim; real ones: less than one a byte
RANK_KINDS = (32, 128, 512, 2048, 8192)
Integers = npt.NDArray[np.integer]


@cache
def compiled() -> ModuleType:
    """The module storage.codec.v3_kernels. Raises StorageError without numba."""
    try:
        from storage.codec import v3_kernels as kernels
    except ImportError as error:
        raise StorageError(
            f"payloads of version 3 need numba ({error}): pip install numba, or dump with codec: v1"
        ) from None
    return kernels


@dataclass(frozen=True, eq=False)
class Tables:
    """What `learn` found in the first rows of a dump, or of a part of it.

    ranks    ids by overall frequency
    starts   int32 [V + 1]  where each token's successors begin in `listed`
    listed   int32 [n]  ids; within a token by descending kind, then ascending rank
    kinds    uint8 [n]  how likely they are kept (upper 3 bits) and how large (lower 3)
    scales   int64 [7]  edges of the classes of positions, 65536 · count + smallest root
    roots    int64 [4]  edges of the classes of roots
    chances  uint16 [FLAGS]  probability of "kept" in each context, in 1/32768
    sums     uint16 [NUMBERS, SYMBOLS + 1]  cumulative probabilities of the other symbols
    learnt   positions that they were learnt from
    cost     bits an entry of these positions takes
    """

    ranks: Ranks
    starts: Int32s
    listed: Int32s
    kinds: npt.NDArray[np.uint8]
    scales: Int64s
    roots: Int64s
    chances: UInt16s
    sums: UInt16s
    learnt: int
    cost: float
    known: Any = field(init=False)
    checksum: int = field(init=False)

    def __post_init__(self) -> None:
        kernels = compiled()
        edges = np.arange(1 << kernels.HINT_BITS) << (kernels.BITS - kernels.HINT_BITS)
        hints = np.array([np.searchsorted(row, edges, side="right") - 1 for row in self.sums])
        rank_kinds = np.digitize(self.ranks.rank_of, RANK_KINDS).astype(np.uint8)
        arrays = (
            *map(unsigned, (self.ranks.order, self.ranks.rank_of)), rank_kinds,
            *map(unsigned, (self.starts, self.listed)), self.kinds, self.scales, self.roots,
            self.chances, self.sums, hints.astype(np.uint8),
        )  # fmt: skip
        # One array type each, writable too: numba would compile again for any other.
        known = kernels.Known(*(np.require(each, requirements=["C", "W"]) for each in arrays))
        checksum = self.ranks.checksum
        for part in (self.starts, self.listed, self.kinds, self.scales, self.roots, self.chances):
            checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
        object.__setattr__(self, "known", known)
        object.__setattr__(self, "checksum", zlib.crc32(self.sums.tobytes(), checksum))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(each.nbytes for each in self.known)

    def row(self, input_ids: npt.ArrayLike, targets: Bools | None = None) -> "Row":
        """The tables for one sequence, to encode and decode its distributions.

        `targets` bool [T] marks the tokens whose distributions are stored, None all of them.
        """
        return Row(self, np.require(input_ids, np.int32, ["C", "W"]), targets)

    def pack(self) -> bytes:
        """The tables as bytes, see FORMAT.md."""
        return self._packed

    @cached_property
    def _packed(self) -> bytes:
        rank_of, size = self.ranks.rank_of, np.diff(self.starts)
        token = np.repeat(np.arange(len(size)), size)
        by_rank = np.lexsort((rank_of[self.listed], token))
        gaps = np.diff(rank_of[self.listed[by_rank]].astype(np.int64), prepend=0)
        first = self.starts[:-1][size > 0]
        gaps[first] = rank_of[self.listed[by_rank][first]]
        widths = np.diff(self.sums.astype(np.int64), axis=1)
        parts = [
            self.ranks.frequent.astype("<i4").tobytes(),
            b"".join(split_planes(size, 2)),
            b"".join(split_planes(gaps, 3)),
            self.kinds[by_rank].tobytes(),
            b"".join([*split_planes(self.chances, 2), *split_planes(widths, 2)]),
        ]
        compressor = zstandard.ZstdCompressor(level=PACKING)
        packed = [compressor.compress(part) for part in parts]
        counts = (self.ranks.vocab_size, len(self.ranks.frequent), len(self.listed))
        edges = [*self.scales.tolist(), *self.roots.tolist()]
        head = HEAD.pack(MAGIC, VERSION, *counts, self.learnt, self.cost, *edges, *map(len, packed))
        body = head + b"".join(packed)
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes, vocab_size: int | None = None) -> "Tables":
        """The inverse of pack; `vocab_size` is the one they must have.

        Raises CorruptPayload, and FormatVersionError for tables of a later release.
        """
        return unpack_tables(data, vocab_size)


@dataclass(frozen=True, eq=False)
class Row:
    """Tables with one sequence: int32 [T], and which of its tokens are learnt.

    positions  int64 [P]  where its distributions stand

    Raises CorruptPayload for tokens outside the vocabulary, and for a mask of another length.
    """

    tables: Tables
    input_ids: Int32s
    targets: Bools | None = None
    positions: Int64s = field(init=False)

    def __post_init__(self) -> None:
        vocab = self.tables.ranks.vocab_size
        positions = positions_within(vocab, self.input_ids, self.targets)
        object.__setattr__(self, "positions", positions)

    @property
    def checksum(self) -> int:
        """CRC-32 of the tables, the ids that were read and the mask; never 0."""
        return checksum_of_row(self.tables.checksum, self.input_ids, self.targets)

    def _walked(self) -> tuple[Int32s, Int32s, npt.NDArray[np.uint8]]:
        """(tokens [P], place and length [P] of their matches)."""
        place, length = compiled().matches(self.input_ids, self.positions)
        return self.input_ids[self.positions].view(np.uint32), place, length

    def symbols(self, grid: RootGrid) -> tuple[UInt16s, UInt16s]:
        """(contexts, symbols) [n] that encode the grid."""
        tokens, place, length = self._walked()
        offsets = np.concatenate([[0], np.cumsum(grid.counts, dtype=np.int64)])
        counts, starts = np.diff(offsets), self.tables.starts
        asked = (starts[tokens + 1] - starts[tokens]).sum(dtype=np.int64)
        asked += counts[:-1].sum() + counts[place[place >= 0]].sum()
        # one for each candidate asked; at most 3 for each number
        room = int(asked) + 6 * len(grid.ids) + 12 * len(counts)
        contexts, symbols = np.empty((2, room), np.uint16)
        written = compiled().list_row(
            self.tables.known, tokens, place, length, offsets, grid.ids.astype(np.uint32),
            grid.roots.astype(np.uint16), grid.tails.astype(np.int32), largest(grid.step),
            contexts, symbols,
        )  # fmt: skip
        return contexts[:written], symbols[:written]

    def write(self, grid: RootGrid) -> UInt16s:
        """The words of the entropy coder."""
        words: UInt16s = compiled().compress(
            *self.symbols(grid), self.tables.chances, self.tables.sums
        )
        return words

    def read(
        self, words: UInt16s, entries: int, most: int, one: int
    ) -> tuple[int, UInt16s, Int32s, UInt16s, Int32s]:
        """(0 or the index in v3.FAILURES, counts [P], ids [E], roots [E], tails [P]).

        most: entries of a position at most; one: the root of 1.
        """
        tokens, place, length = self._walked()
        counts, tails = np.zeros(len(tokens), np.uint16), np.zeros(len(tokens), np.int32)
        ids, roots = np.zeros(entries, np.int32), np.zeros(entries, np.uint16)
        failure, found = compiled().read_row(
            self.tables.known, tokens, place, length, words, one, most, counts,
            ids.view(np.uint32), roots, tails,
        )  # fmt: skip
        return failure or (0 if found == entries else 2), counts, ids, roots, tails


def unsigned(numbers: Int32s) -> npt.NDArray[np.uint32]:
    """The same numbers, none of them negative, as the kernels index with them."""
    return np.ascontiguousarray(numbers, np.int32).view(np.uint32)


def list_order(starts: Int32s, listed: Int32s, kinds: Integers, ranks: Ranks) -> Int64s:
    """[n] the order in which a token's successors are asked: by descending kind, then by rank."""
    token = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return np.asarray(np.lexsort((ranks.rank_of[listed], -kinds.astype(np.int64), token)))


def unpack_tables(data: bytes, vocab_size: int | None) -> Tables:
    """See Tables.unpack."""
    kernels = compiled()
    if len(data) < HEAD.size + 4 or data[:4] != MAGIC:
        raise CorruptPayload(
            f"tables: {len(data)} bytes that start with {data[:4]!r}, expected {MAGIC!r}"
        )
    _, version, vocab, frequent, total, learnt, cost, *rest = HEAD.unpack_from(data)
    if version != VERSION:
        raise FormatVersionError(
            f"tables of version {version}, this release reads version {VERSION}; update mol-distill"
        )
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise CorruptPayload("tables: checksum does not match")
    scales, roots = np.array(rest[:7], np.uint64), np.array(rest[7:11], np.uint64)
    sizes = rest[11:]
    if not 0 < vocab <= 1 << 22 or frequent > vocab or total > vocab * kernels.MOST_LISTED:
        raise CorruptPayload(f"tables: impossible header {(vocab, frequent, total)}")
    if vocab_size not in (None, vocab):
        raise CorruptPayload(f"tables: a vocabulary of {vocab} ids, the plan says {vocab_size}")
    if total > max(FREE_LISTED, MOST_LISTED_PER_BYTE * len(data)):
        raise CorruptPayload(f"tables: {total} listed ids in {len(data)} bytes")
    if HEAD.size + sum(sizes) + 4 != len(data):
        raise CorruptPayload("tables: cut short")
    if int(scales.max()) >= 1 << 33 or int(roots.max()) >= 1 << 17 or not 0 <= cost < 1 << 16:
        raise CorruptPayload("tables: impossible edges or cost")
    raw_sizes = (
        4 * frequent, 2 * vocab, 3 * total, total,
        2 * kernels.FLAGS + 2 * kernels.NUMBERS * kernels.SYMBOLS,
    )  # fmt: skip
    parts, at = [], HEAD.size
    for size, raw_size in zip(sizes, raw_sizes, strict=True):
        parts.append(np.frombuffer(inflate(data[at : at + size], raw_size), np.uint8))
        at += size
    leading, length_planes, gap_planes, kinds, probabilities = parts
    ranks = Ranks(leading.view("<i4"), vocab)
    starts, listed = unpack_lists(
        from_planes(length_planes, 2),
        from_planes(gap_planes, 3),
        ranks,
        total,
        kernels.MOST_LISTED,
    )
    if int(kinds.max(initial=0)) >= 64:
        raise CorruptPayload("tables: impossible kinds")
    order = list_order(starts, listed, kinds, ranks)
    chances, sums = unpack_probabilities(probabilities)
    return Tables(
        ranks, starts, listed[order], kinds[order], scales.astype(np.int64),
        roots.astype(np.int64), chances, sums, learnt, cost,
    )  # fmt: skip


def unpack_probabilities(raw: npt.NDArray[np.uint8]) -> tuple[UInt16s, UInt16s]:
    """(chances, sums) of Tables. Raises CorruptPayload."""
    kernels = compiled()
    chances = from_planes(raw[: 2 * kernels.FLAGS], 2)
    widths = from_planes(raw[2 * kernels.FLAGS :], 2).reshape(kernels.NUMBERS, kernels.SYMBOLS)
    if (
        not 0 < int(chances.min()) <= int(chances.max()) < kernels.ONE
        or int(widths.min()) < 1
        or (widths.sum(axis=1) != kernels.ONE).any()
    ):
        raise CorruptPayload("tables: impossible probabilities")
    sums = np.zeros((kernels.NUMBERS, kernels.SYMBOLS + 1), np.uint16)
    sums[:, 1:] = np.cumsum(widths, axis=1)
    return chances.astype(np.uint16), sums
