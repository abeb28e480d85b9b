"""Payload version 3: a grid of roots, and everything of it in one stream of coded symbols.

The first part is empty; it has room for the head of a row (storage.row_head). The second holds
uint16 words, coded by v3_kernels: the most entries of a position, then the row. Its last four bytes
are a CRC-32 of the header and these words.
"""

import struct
import zlib

import numpy as np

from storage.codec.frames import HEADER, Frames, Header, Planes, join
from storage.codec.root_grid import MAX_STEP, MIN_STEP, RootGrid, largest
from storage.codec.v3_tables import Row
from storage.errors import CorruptPayload, InvalidRecord

VERSION = 3
FAILURES = (
    "",
    "the coded entries end too early",
    "another number of entries than the header says",
    "an id outside the vocabulary, or an id twice",
    "a root above that of 1, or an impossible tail",
    "data follows the last coded entry",
)


def pack(grid: RootGrid, row: Row) -> bytes:
    """Encode a grid. Raises InvalidRecord if `row` has another length or vocabulary."""
    vocab = row.tables.ranks.vocab_size
    if vocab != grid.vocab_size:
        raise InvalidRecord(f"the tables have {vocab} ids, the vocabulary has {grid.vocab_size}")
    if len(row.positions) != len(grid.counts):
        raise InvalidRecord(f"{len(grid.counts)} positions, the row has {len(row.positions)}")
    header = Header(
        VERSION, Planes(0, 0, 0, 0, 0), grid.step, vocab, len(grid.counts), len(grid.ids),
        row.checksum,
    ).pack()  # fmt: skip
    most = struct.pack("<H", int(grid.counts.max(initial=0)))
    words = most + row.write(grid).astype("<u2").tobytes()
    return join(header, [b"", words + struct.pack("<I", zlib.crc32(words, zlib.crc32(header)))])


def unpack(header: Header, data: bytes, row: Row | None) -> RootGrid:
    """The inverse of pack. Raises CorruptPayload."""
    if row is None or row.checksum != header.needs or len(row.positions) != header.positions:
        raise CorruptPayload(
            "the payload needs the tables of its own dump and the input_ids of its own row "
            f"(checksum {header.needs:08x}, found {row.checksum if row else 0:08x}): "
            "pass tables.row(input_ids, targets)"
        )
    if row.tables.ranks.vocab_size != header.vocab_size:
        raise CorruptPayload(
            f"a vocabulary of {header.vocab_size} ids, the tables have "
            f"{row.tables.ranks.vocab_size}"
        )
    if header.planes.total != 2 or header.planes.counts or not MIN_STEP <= header.step <= MAX_STEP:
        raise CorruptPayload(f"impossible header: {header.planes}, step {header.step}")
    frames = Frames(data, 2)
    frames.part()
    coded = frames.part()
    crc = zlib.crc32(coded[:-4], zlib.crc32(data[: HEADER.size]))
    if len(coded) < 6 or len(coded) % 2 or crc != int.from_bytes(coded[-4:], "little"):
        raise CorruptPayload("checksum does not match: the payload is damaged")
    words = np.frombuffer(coded[:-4], "<u2").astype(np.uint16)
    most = min(int(words[0]), header.entries, header.vocab_size)
    failure, counts, ids, roots, tails = row.read(
        words[1:], header.entries, most, largest(header.step)
    )
    if failure:
        raise CorruptPayload(FAILURES[failure])
    return RootGrid(header.step, header.vocab_size, counts, ids, roots, tails)
