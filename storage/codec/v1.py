"""Payload version 1: ids renumbered by frequency, everything in byte planes.

Each plane (all low bytes, then all high bytes) is a zstd frame. Grid differences are stored by rank
(the first differences of all positions, then the second ones, ...), because those are similar.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from storage.codec.frames import Frames, Header, Planes, deflate, join, split_planes
from storage.codec.grid import Grid, Integers, check_best
from storage.errors import CorruptPayload, InvalidRecord
from storage.topk import Int32s, TopK, UInt16s

VERSION = 1


@dataclass(frozen=True, eq=False)
class Ranks:
    """A renumbering of the vocabulary: `order[r]` is the token id of rank r, int32 [V].

    `frequent` holds only the leading ranks; all other ids follow in ascending order, so a table
    stores only the ids worth moving. Raises CorruptPayload for an id that is outside the
    vocabulary or appears twice.
    """

    frequent: Int32s
    vocab_size: int
    order: Int32s = field(init=False)
    checksum: int = field(init=False)

    def __post_init__(self) -> None:
        frequent = np.ascontiguousarray(self.frequent, np.int32)
        rest = np.ones(self.vocab_size, bool)
        if len(frequent) and not 0 <= frequent.min() <= frequent.max() < self.vocab_size:
            raise CorruptPayload(f"rank table: ids outside the vocabulary of {self.vocab_size}")
        rest[frequent] = False
        order = np.concatenate([frequent, np.flatnonzero(rest)]).astype(np.int32)
        if len(order) != self.vocab_size:
            raise CorruptPayload("rank table: an id appears twice")
        checksum = zlib.crc32(order.astype("<i4").tobytes()) or 1  # 0 means "no table"
        for name, value in [("order", order), ("checksum", checksum)]:
            object.__setattr__(self, name, value)

    @cached_property
    def rank_of(self) -> Int32s:
        """int32 [V]: the rank of each id, which only a writer and version 2 need."""
        ranks = np.empty_like(self.order)
        ranks[self.order] = np.arange(self.vocab_size, dtype=np.int32)
        return ranks

    @classmethod
    def learn(cls, kept: Iterable[TopK | Grid], vocab_size: int) -> "Ranks":
        """Rank the ids by how often they are kept, most frequent first."""
        frequency = np.zeros(vocab_size, np.int64)
        for one in kept:
            frequency += np.bincount(one.ids, minlength=vocab_size)
        seen = int((frequency > 0).sum())
        return cls(np.argsort(-frequency, kind="stable")[:seen].astype(np.int32), vocab_size)


def pack(grid: Grid, ranks: Ranks | None) -> bytes:
    """Encode a grid. Raises InvalidRecord if `ranks` has another vocabulary."""
    if ranks is not None and ranks.vocab_size != grid.vocab_size:
        raise InvalidRecord(
            f"the rank table has {ranks.vocab_size} ids, the vocabulary has {grid.vocab_size}"
        )
    counts, filled = grid.counts, grid.counts > 0
    equal = is_equal(counts)
    steps = np.diff(grid.below, prepend=0)
    steps[(np.cumsum(counts, dtype=np.int64) - counts)[filled]] = 0
    groups = [
        split_planes(counts[:1] if equal else counts, 2),
        split_planes(grid.ids if ranks is None else ranks.rank_of[grid.ids]),
        split_planes(to_rank_major(steps, counts, equal)),
        split_planes(grid.best[filled]),
        split_planes(grid.tails),
    ]
    header = Header(
        VERSION,
        Planes(0 if equal else 2, *(len(group) for group in groups[1:])),
        grid.step,
        grid.vocab_size,
        len(counts),
        len(grid.ids),
        0 if ranks is None else ranks.checksum,
    )
    return join(header.pack(), deflate(groups))


def unpack(header: Header, data: bytes, ranks: Ranks | None) -> Grid:
    """The inverse of pack. Raises CorruptPayload."""
    here = 0 if ranks is None else ranks.checksum
    if header.needs != here:
        raise CorruptPayload(
            f"the payload needs the rank table with checksum {header.needs:08x}, found {here:08x}: "
            "use the one in the footer of its own shard"
        )
    if ranks is not None and ranks.vocab_size != header.vocab_size:
        raise CorruptPayload(
            f"a vocabulary of {header.vocab_size} ids, the rank table has {ranks.vocab_size}"
        )
    planes, entries = header.planes, header.entries
    if not planes.ids and entries > header.positions:  # all ids are 0, at most one per position
        raise CorruptPayload(f"impossible header: {entries} entries of the same id")
    frames = Frames(data, planes.total)
    counts = frames.counts(header)
    ids = frames.take(planes.ids, entries)
    if entries and int(ids.max()) >= header.vocab_size:
        raise CorruptPayload(f"id {ids.max()} is outside the vocabulary of {header.vocab_size}")
    ids = ids if ranks is None else np.take(ranks.order, ids)
    steps = frames.take(planes.steps, entries)
    filled = counts > 0
    check_best(steps[: int(filled.sum())] != 0, filled)  # by rank: the first ones stand first
    best = np.zeros(len(counts), np.int64)
    best[filled] = frames.take(planes.best, int(filled.sum()))
    tails = frames.take(planes.tails, len(counts))
    below = to_descent(steps, counts, planes.counts == 0)
    return Grid(
        header.step, header.vocab_size, counts, ids.astype(np.int32, copy=False), below, best, tails
    )


def is_equal(counts: UInt16s) -> bool:
    """Whether all positions hold the same number of entries."""
    return len(counts) == 0 or bool((counts == counts[0]).all())


def rank_order(counts: UInt16s) -> npt.NDArray[np.int64]:
    """[E] position-major index of each entry, sorted by rank within the position."""
    starts = np.cumsum(counts, dtype=np.int64) - counts
    rank = np.arange(int(counts.sum(dtype=np.int64))) - np.repeat(starts, counts)
    return np.argsort(rank, kind="stable")


def to_rank_major(values: Integers, counts: UInt16s, equal: bool) -> Integers:
    """Values [E] by position -> by rank within the position."""
    if equal and len(values):
        return np.asarray(values.reshape(len(counts), -1).T.reshape(-1))
    return np.asarray(values[rank_order(counts)])


def to_descent(steps: Integers, counts: UInt16s, equal: bool) -> Integers:
    """Differences [E] by rank -> their running sums [E] within each position, by position."""
    if equal and len(steps):
        dtype = np.int32 if steps.dtype == np.uint8 else np.int64  # 65,535 times 255 fits
        sums = steps.reshape(-1, len(counts)).T.astype(dtype, order="C")
        return np.asarray(np.cumsum(sums, axis=1, out=sums).reshape(-1))
    by_position = np.empty(len(steps), np.int64)
    by_position[rank_order(counts)] = steps
    sums = np.cumsum(by_position)
    starts = np.cumsum(counts, dtype=np.int64) - counts
    filled = counts > 0
    return np.asarray(sums - np.repeat(sums[starts[filled]], counts[filled]))
