"""The tables that version 2 learns from a shard: ids kept after each token, and how likely.

The tables are integers and are stored in the shard. Only learning them uses floats.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from storage.codec.frames import inflate, split_planes
from storage.codec.grid import Grid, Integers
from storage.codec.v1 import Ranks
from storage.errors import CorruptPayload, StorageError
from storage.targets import Bools, Int64s, pack_mask, positions_of
from storage.topk import Int32s, UInt16s

MAX_LEVEL = 4096  # grid points between the best and the last entry, exclusive
MOST_LISTED = 256  # successors of one token
SEEN = 3  # times; listing a successor seen less often costs more than it saves
MOST_LISTED_PER_BYTE, FREE_LISTED = 64, 1 << 20  # a table's claim; real ones: less than one a byte
LEARN_ENTRIES = 1 << 24  # to learn probabilities from, evenly over the shard
KIND_CHANCES = (0.02, 0.05, 0.12, 0.25, 0.45, 0.7, 0.9)
RANK_KINDS = (32, 128, 512, 2048, 8192)
PARTS = struct.Struct("<BIII6I")  # shift, V, frequent ids, listed; bytes of each compressed part


@cache
def compiled() -> ModuleType:
    """The module storage.codec.v2_kernels. Raises StorageError without numba."""
    try:
        from storage.codec import v2_kernels as kernels
    except ImportError as error:
        raise StorageError(
            f"payloads of version 2 need numba ({error}): pip install numba, or dump with codec: v1"
        ) from None
    return kernels


@dataclass(frozen=True, eq=False)
class Successors:
    """The tables of a shard.

    ranks        ids by overall frequency
    starts       int32 [V + 1]  where each token's successors begin in `listed`
    listed       int32 [n]  ids, by ascending rank
    kinds        uint8 [n]  how likely they are kept (upper 3 bits) and at which level (lower 3)
    level_kinds  uint8 [MAX_LEVEL]  class of a level, 0 to 6
    shift        number of low bits of a level that are written plainly
    chances      uint16 [FLAGS]  probability of "kept" in each context, in 1/32768
    sums         uint16 [contexts, 257]  cumulative probabilities of the other symbols
    """

    ranks: Ranks
    starts: Int32s
    listed: Int32s
    kinds: npt.NDArray[np.uint8]
    level_kinds: npt.NDArray[np.uint8]
    shift: int
    chances: UInt16s
    sums: UInt16s
    hints: npt.NDArray[np.uint8] = field(init=False)
    rank_kinds: npt.NDArray[np.uint8] = field(init=False)
    checksum: int = field(init=False)

    def __post_init__(self) -> None:
        kernels = compiled()
        edges = np.arange(0, kernels.ONE, kernels.ONE // 256)
        hints = [np.searchsorted(row, edges, side="right") - 1 for row in self.sums]
        rank_kinds = np.digitize(self.ranks.rank_of, RANK_KINDS).astype(np.uint8)
        checksum = self.ranks.checksum
        for part in (self.starts, self.listed, self.kinds, self.level_kinds, self.chances):
            checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
        checksum = zlib.crc32(bytes([self.shift]) + self.sums.tobytes(), checksum)
        for name in ("starts", "listed", "kinds", "level_kinds", "chances", "sums"):
            # One array type each, writable too: numba would compile again for any other.
            object.__setattr__(self, name, np.require(getattr(self, name), requirements=["C", "W"]))
        object.__setattr__(self, "hints", np.array(hints, np.uint8))
        object.__setattr__(self, "rank_kinds", rank_kinds)
        object.__setattr__(self, "checksum", checksum)

    def row(self, input_ids: npt.ArrayLike, targets: Bools | None = None) -> "Row":
        """The tables for one sequence, to encode and decode its distributions.

        `targets` bool [T] marks the tokens whose distributions are stored, None all of them.
        """
        return Row(self, np.require(input_ids, np.int32, ["C", "W"]), targets)

    @classmethod
    def learn(
        cls,
        rows: Sequence[tuple[Int32s, Grid]],
        vocab_size: int,
        masks: Sequence[Bools | None] | None = None,
    ) -> "Successors":
        """Learn the tables from the (input_ids, grid) of all rows of a shard, and their masks."""
        kernels = compiled()
        masks = [None] * len(rows) if masks is None else masks
        ranks = Ranks.learn((grid for _, grid in rows), vocab_size)
        levels = [levels_of(grid) for _, grid in rows]
        every = np.concatenate([np.zeros(0, np.uint16), *levels])
        edges = np.quantile(every, [0.08, 0.2, 0.35, 0.55, 0.75, 0.9]) if len(every) else [0] * 6
        level_kinds = np.digitize(np.arange(MAX_LEVEL), np.maximum(edges, 1)).astype(np.uint8)
        top = int(np.quantile(every, 0.999)) if len(every) else 0
        shift = max(0, (top // kernels.LEVELS).bit_length())
        tokens = [
            input_ids[positions_of(targets, len(input_ids))]
            for (input_ids, _), targets in zip(rows, masks, strict=True)
        ]
        starts, listed, kinds = list_successors(tokens, [grid for _, grid in rows], every, ranks)
        flags = np.zeros((kernels.FLAGS, 2), np.int64)
        tables = np.zeros((kernels.RAW - kernels.LEVEL, kernels.SYMBOLS), np.int64)
        plain = cls(
            ranks, starts, listed, kinds, level_kinds, shift,
            to_chances(flags), to_sums(tables),
        )  # fmt: skip
        share = slice(None, None, 1 + len(every) // LEARN_ENTRIES)
        for (input_ids, grid), targets in zip(rows[share], masks[share], strict=True):
            if fits(grid):
                kernels.count(*plain.row(input_ids, targets).symbols(grid), flags, tables)
        return cls(
            ranks, starts, listed, kinds, level_kinds, shift,
            to_chances(flags), to_sums(tables),
        )  # fmt: skip

    def pack(self) -> bytes:
        """The tables as bytes, see FORMAT.md."""
        rank_of, size = self.ranks.rank_of, np.diff(self.starts)
        gaps = np.diff(rank_of[self.listed].astype(np.int64), prepend=0)
        first = self.starts[:-1][size > 0]
        gaps[first] = rank_of[self.listed[first]]
        widths = np.diff(self.sums.astype(np.int64), axis=1)
        parts = [
            self.ranks.frequent.astype("<i4").tobytes(),
            b"".join(split_planes(size, 2)),
            b"".join(split_planes(gaps, 3)),
            self.kinds.tobytes(),
            self.level_kinds.tobytes(),
            b"".join([*split_planes(self.chances, 2), *split_planes(widths, 2)]),
        ]
        compressor = zstandard.ZstdCompressor(level=19)
        packed = [compressor.compress(part) for part in parts]
        counts = (self.ranks.vocab_size, len(self.ranks.frequent), len(self.listed))
        head = PARTS.pack(self.shift, *counts, *(len(part) for part in packed))
        body = head + b"".join(packed)
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes, vocab_size: int | None = None) -> "Successors":
        """The inverse of pack; `vocab_size` is the one they must have. Raises CorruptPayload."""
        kernels = compiled()
        checksum = int.from_bytes(data[-4:], "little")
        if len(data) < PARTS.size + 4 or zlib.crc32(data[:-4]) != checksum:
            raise CorruptPayload("table of successors: checksum does not match")
        shift, vocab, frequent, total, *sizes = PARTS.unpack(data[: PARTS.size])
        tables = kernels.RAW - kernels.LEVEL
        if not 0 < vocab <= 1 << 22 or frequent > vocab or total > vocab * MOST_LISTED or shift > 8:
            raise CorruptPayload(f"table of successors: impossible header {(shift, vocab, total)}")
        if vocab_size not in (None, vocab):
            raise CorruptPayload(
                f"table of successors: a vocabulary of {vocab} ids, the plan says {vocab_size}"
            )
        if total > max(FREE_LISTED, MOST_LISTED_PER_BYTE * len(data)):
            raise CorruptPayload(f"table of successors: {total} listed ids in {len(data)} bytes")
        if PARTS.size + sum(sizes) + 4 != len(data):
            raise CorruptPayload("table of successors: cut short")
        raw_sizes = (
            4 * frequent, 2 * vocab, 3 * total, total, MAX_LEVEL,
            2 * kernels.FLAGS + 2 * tables * kernels.SYMBOLS,
        )  # fmt: skip
        parts, at = [], PARTS.size
        for size, raw_size in zip(sizes, raw_sizes, strict=True):
            parts.append(np.frombuffer(inflate(data[at : at + size], raw_size), np.uint8))
            at += size
        leading, length_planes, gap_planes, kinds, level_kinds, probabilities = parts
        ranks = Ranks(leading.view("<i4"), vocab)
        lengths, gaps = from_planes(length_planes, 2), from_planes(gap_planes, 3)
        starts, listed = unpack_lists(lengths, gaps, ranks, total, MOST_LISTED)
        chances = from_planes(probabilities[: 2 * kernels.FLAGS], 2)
        widths = from_planes(probabilities[2 * kernels.FLAGS :], 2).reshape(tables, kernels.SYMBOLS)
        if (
            int(kinds.max(initial=0)) >= 64
            or int(level_kinds.max()) > 6
            or not 0 < int(chances.min()) <= int(chances.max()) < kernels.ONE
            or int(widths.min()) < 1
            or (widths.sum(axis=1) != kernels.ONE).any()
        ):
            raise CorruptPayload("table of successors: impossible probabilities")
        cumulative = np.zeros((tables, kernels.SYMBOLS + 1), np.uint16)
        cumulative[:, 1:] = np.cumsum(widths, axis=1)
        return cls(
            ranks, starts, listed, kinds, level_kinds, shift,
            chances.astype(np.uint16), cumulative,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Row:
    """The tables of a shard with one sequence: int32 [T], and which of its tokens are learnt.

    positions  int64 [P]  where its distributions stand

    Raises CorruptPayload for tokens outside the vocabulary, and for a mask of another length.
    """

    successors: Successors
    input_ids: Int32s
    targets: Bools | None = None
    positions: Int64s = field(init=False)

    def __post_init__(self) -> None:
        vocab = self.successors.ranks.vocab_size
        positions = positions_within(vocab, self.input_ids, self.targets)
        object.__setattr__(self, "positions", positions)

    @property
    def checksum(self) -> int:
        return checksum_of_row(self.successors.checksum, self.input_ids, self.targets)

    def symbols(self, grid: Grid) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(contexts, symbols) [n] that encode the grid."""
        sizes, counts = np.diff(self.successors.starts), grid.counts.astype(np.int64)
        place, _ = compiled().matches(self.input_ids, self.positions)
        asked = sizes[self.input_ids[self.positions]].sum()
        asked += counts[:-1].sum() + counts[place[place >= 0]].sum()
        # one for each candidate asked; for each entry at most 3 for its gap and 3 for its level
        contexts, symbols = np.empty((2, int(asked) + 6 * len(grid.ids)), np.int32)
        levels = levels_of(grid).astype(np.int32)
        nothing = np.zeros(0, np.uint16)
        _, written = self._walk(
            False, grid.counts, grid.spreads, grid.ids.copy(), levels, nothing, contexts, symbols
        )
        return contexts[:written], symbols[:written]

    def compress(self, contexts: Int32s, symbols: Int32s) -> UInt16s:
        """The words of the entropy coder."""
        tables = self.successors
        words: UInt16s = compiled().compress(contexts, symbols, tables.chances, tables.sums)
        return words

    def read(
        self, counts: UInt16s, spreads: Integers, words: UInt16s
    ) -> tuple[Int32s, Int32s, int]:
        """(ids [E], levels [E], 0 or the index in v2.FAILURES)."""
        ids, levels = np.zeros((2, int(counts.sum(dtype=np.int64))), np.int32)
        nothing = np.zeros(0, np.int32)
        words = np.array(words, np.uint16)
        failure, _ = self._walk(True, counts, spreads, ids, levels, words, nothing, nothing)
        return ids, levels, int(failure)

    def _walk(self, reading: bool, counts: UInt16s, spreads: Integers, *arrays: Any) -> Any:
        ids, levels, words, contexts, symbols = arrays
        s = self.successors
        return compiled().walk(
            reading, self.input_ids, self.positions, counts, spreads.astype(np.int32), ids, levels,
            s.starts, s.listed, s.kinds, s.ranks.order, s.ranks.rank_of, s.rank_kinds,
            s.level_kinds, s.shift, s.chances, s.sums, s.hints, words, contexts, symbols,
        )  # fmt: skip


def fits(grid: Grid) -> bool:
    """Whether version 2 can hold the grid; version 1 holds any."""
    return int(grid.below.max(initial=0)) < MAX_LEVEL


def levels_of(grid: Grid) -> UInt16s:
    """uint16 [E]: grid points between an entry and the last one of its position."""
    levels = np.repeat(grid.spreads, grid.counts) - grid.below
    return np.asarray(np.minimum(levels, MAX_LEVEL - 1), np.uint16)


def list_successors(
    of_rows: Sequence[Int32s], grids: Sequence[Grid], levels: UInt16s, ranks: Ranks
) -> tuple[Int32s, Int32s, npt.NDArray[np.uint8]]:
    """(starts, listed, kinds) of Successors, from the tokens [P] and the grid of each row."""
    none = np.zeros(0, np.int32)
    tokens = np.concatenate([none, *of_rows])
    counts = np.concatenate([none, *(grid.counts for grid in grids)])
    ids = np.concatenate([none, *(grid.ids for grid in grids)])
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    shares = (0.15, 0.3, 0.42, 0.55, 0.68, 0.8, 0.9)
    edges = np.quantile(levels, shares) if len(levels) else np.zeros(7)
    sizes, listed, times, means, of = compiled().tally(
        np.argsort(tokens, kind="stable"), tokens, offsets, ids, levels, ranks.rank_of,
        SEEN, MOST_LISTED,
    )  # fmt: skip
    kinds = np.digitize(times / np.maximum(of, 1), KIND_CHANCES) * 8 + np.digitize(means, edges)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return starts, listed, kinds.astype(np.uint8)


def to_chances(flags: Integers) -> UInt16s:
    """Counts of yes and no [FLAGS, 2] -> probability of yes [FLAGS], in 1/32768, never 0 or 1.

    The fewer counts a context has, the closer it is to the mean over candidates of its kind.
    """
    kernels = compiled()
    kinds = flags.reshape(kernels.LISTED + kernels.UNLISTED, -1, 2)
    alike = (kinds.sum(axis=1) + 0.5) / (kinds.sum(axis=(1, 2)) + 1)[:, None]
    chances = (kinds[..., 0] + alike[:, :1]) / (kinds.sum(axis=2) + 1)
    one = kernels.ONE
    return np.asarray(np.clip(chances.reshape(-1) * one, 1, one - 1), np.uint16)


def to_sums(tables: Integers) -> UInt16s:
    """Counts [n, SYMBOLS] -> cumulative probabilities [n, SYMBOLS + 1], each step at least 1."""
    one, symbols = compiled().ONE, tables.shape[1]
    share = (tables + 1 / symbols) / (tables.sum(axis=1, keepdims=True) + 1)
    widths = 1 + np.floor(share * (one - symbols)).astype(np.int64)
    rows = np.arange(len(widths))
    widths[rows, widths.argmax(axis=1)] += one - widths.sum(axis=1)
    sums = np.zeros((len(tables), symbols + 1), np.uint16)
    sums[:, 1:] = np.cumsum(widths, axis=1)
    return sums


def from_planes(raw: npt.NDArray[np.uint8], planes: int) -> npt.NDArray[np.int64]:
    """The inverse of split_planes."""
    parts = raw.reshape(planes, -1).astype(np.int64)
    return np.asarray(sum(parts[plane] << (8 * plane) for plane in range(planes)))


def unpack_lists(
    lengths: Int64s, gaps: Int64s, ranks: Ranks, total: int, most: int
) -> tuple[Int32s, Int32s]:
    """(starts [V + 1], listed [total]) of tables: each token's successors by ascending rank.

    lengths [V]; gaps [total] between ranks; most: successors of one token. Raises CorruptPayload.
    """
    if int(lengths.max()) > most or int(lengths.sum()) != total:
        raise CorruptPayload(
            f"tables: {lengths.max()} listed after one token and {lengths.sum()} in all, header "
            f"says {total}"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    sums = np.cumsum(gaps)
    before = np.concatenate([[0], sums])[starts[:-1]]
    listed = sums - np.repeat(before, lengths)
    inside = np.ones(total, bool)
    inside[starts[:-1][lengths > 0]] = False  # gaps within a list are at least 1
    if total and (int(listed.max()) >= ranks.vocab_size or int(gaps[inside].min(initial=1)) < 1):
        raise CorruptPayload("tables: an id outside the vocabulary, or an id twice")
    return starts, ranks.order[listed]


def positions_within(vocab: int, input_ids: Int32s, targets: Bools | None) -> Int64s:
    """The positions [P] of a sequence [T]. Raises CorruptPayload for a foreign id or mask."""
    read = input_ids[:-1]
    if len(read) and not 0 <= read.min() <= read.max() < vocab:
        raise CorruptPayload(f"input ids outside the vocabulary of {vocab}")
    if targets is not None and len(targets) != len(input_ids):
        raise CorruptPayload(f"a mask of {len(targets)} tokens for {len(input_ids)} input ids")
    return positions_of(targets, len(input_ids))


def checksum_of_row(tables: int, input_ids: Int32s, targets: Bools | None) -> int:
    """CRC-32 of the tables (`tables`), the ids that were read and the mask; never 0."""
    checksum = zlib.crc32(input_ids[:-1].astype("<i4").tobytes(), tables)
    if targets is not None:
        checksum = zlib.crc32(pack_mask(targets), checksum)
    return checksum or 1
