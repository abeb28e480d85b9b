"""Payload version 2: a compiled entropy coder codes ids and levels from their context.

Numbers that occur once per position (entries, spread, best, tail) are byte planes as in version 1.
The entries, coded by v2_kernels, follow; the last part is a CRC-32 of all before it.
"""

import struct
import zlib

import numpy as np

from storage.codec.frames import Frames, Header, Planes, deflate, join, split_planes
from storage.codec.grid import Grid, check_best
from storage.codec.v1 import is_equal
from storage.codec.v2_tables import MAX_LEVEL, Row
from storage.errors import CorruptPayload, InvalidRecord

VERSION = 2
FAILURES = (
    "",
    "the coded entries end too early",
    "more entries than the counts say",
    "an id outside the vocabulary, or an id twice",
    "an entry above the best one",
    "data follows the last coded entry",
)


def pack(grid: Grid, row: Row) -> bytes:
    """Encode a grid. Raises InvalidRecord if `row` has another length or vocabulary."""
    if row.successors.ranks.vocab_size != grid.vocab_size:
        raise InvalidRecord(
            f"the tables have {row.successors.ranks.vocab_size} ids, the vocabulary has "
            f"{grid.vocab_size}"
        )
    if len(row.positions) != len(grid.counts):
        raise InvalidRecord(f"{len(grid.counts)} positions, the row has {len(row.positions)}")
    counts, spreads, filled = grid.counts, grid.spreads, grid.counts > 0
    equal = is_equal(counts)
    contexts, symbols = row.symbols(grid)
    words = row.compress(contexts, symbols)
    groups = [
        split_planes(counts[:1] if equal else counts, 2),
        [],
        split_planes(spreads[filled]),
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
        row.checksum,
    )
    body = join(header.pack(), [*deflate(groups), words.astype("<u2").tobytes(), bytes(4)])
    return body[:-4] + struct.pack("<I", zlib.crc32(body[:-4]))


def unpack(header: Header, data: bytes, row: Row | None) -> Grid:
    """The inverse of pack. Raises CorruptPayload."""
    if row is None or row.checksum != header.needs or len(row.positions) != header.positions:
        raise CorruptPayload(
            "the payload needs the successors of its own shard and the input_ids of its own row "
            f"(checksum {header.needs:08x}, found {row.checksum if row else 0:08x}): "
            "pass successors.row(input_ids, targets)"
        )
    if row.successors.ranks.vocab_size != header.vocab_size:
        raise CorruptPayload(
            f"a vocabulary of {header.vocab_size} ids, the tables have "
            f"{row.successors.ranks.vocab_size}"
        )
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise CorruptPayload("checksum does not match: the payload is damaged")
    planes = header.planes
    frames = Frames(data, planes.total + 2)
    counts = frames.counts(header)
    filled = counts > 0
    spreads, best = np.zeros((2, len(counts)), np.int64)
    spreads[filled] = frames.take(planes.steps, int(filled.sum()))
    best[filled] = frames.take(planes.best, int(filled.sum()))
    tails = frames.take(planes.tails, len(counts))
    coded = frames.part()
    if len(coded) % 2 or int(spreads.max(initial=0)) >= MAX_LEVEL or planes.ids:
        raise CorruptPayload("impossible spreads or coded entries")
    ids, levels, failure = row.read(counts, spreads, np.frombuffer(coded, "<u2"))
    if failure:
        raise CorruptPayload(FAILURES[failure])
    first = (np.cumsum(counts, dtype=np.int64) - counts)[filled]
    check_best(levels[first] != spreads[filled], filled)
    below = np.repeat(spreads.astype(np.int32), counts) - levels
    return Grid(header.step, header.vocab_size, counts, ids, below, best, tails)
