"""Where the rows of a closed data file lie, found by their first bytes.

Only what is uncompressed and plain has a place in a Parquet file, as payloads, samples and tables
of our writers have: there a value is its length (uint32) and its bytes.
"""

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet as pq

from storage.errors import CorruptShard, Unindexable
from storage.index import Part, entries_of

SHOWN = 64  # bytes of a value that are looked for


def start(value: bytes) -> bytes:
    """A value's length and first bytes, as PLAIN writes them."""
    return struct.pack("<I", len(value)) + value[:SHOWN]


def size_at(started: bytes) -> int:
    """Bytes of the value with this start."""
    return int.from_bytes(started[:4], "little")


@dataclass
class Group:
    """The rows of a row group: their tokens, the starts of their values, heads if kept apart,
    their targets if they have masks."""

    tokens: list[int]
    payloads: list[bytes]
    samples: list[bytes]  # empty without samples
    heads: list[bytes] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


class Places:
    """Finds values in the bytes of a data file."""

    def __init__(self, data: bytes | mmap.mmap, metadata: pq.FileMetaData) -> None:
        self.data, self.metadata = data, metadata
        schema = metadata.schema
        self.columns = {schema.column(n).path.split(".")[0]: n for n in range(len(schema))}

    def part(self, groups: list[Group], successors: bytes, samples: bool) -> Part:
        """What the index says of the file. `successors` starts version 2's tables, if it has some.

        Raises Unindexable where the values do not lie as written.
        """
        found: dict[str, list[int]] = {"payload": [], "samples": []}
        for number, group in enumerate(groups):
            found["payload"] += self.column(number, "payload", group.payloads)
            if samples:
                found["samples"] += self.column(number, "samples", group.samples)
        heads = [head for group in groups for head in group.heads]
        sizes = [list(map(len, heads))] if any(heads) else []
        entries = entries_of(
            found["payload"],
            [size_at(value) for group in groups for value in group.payloads],
            (found["samples"], [size_at(v) for one in groups for v in one.samples])
            if samples
            else None,
            *sizes,
        )
        tokens = np.array([tokens for group in groups for tokens in group.tokens], np.int32)
        targets = [targets for group in groups for targets in group.targets]
        masks = np.array(targets, np.int32) if targets else None
        return Part(tokens, entries, self.tables(successors), b"".join(heads), masks)

    def column(self, group: int, name: str, starts: Iterable[bytes]) -> list[int]:
        """Offsets of the values of a row group."""
        chunk = self.metadata.row_group(group).column(self.columns[name])
        plain = chunk.compression == "UNCOMPRESSED"
        at = int(chunk.data_page_offset)
        end = at + int(chunk.total_compressed_size)
        offsets = []
        for value in starts:
            found = self.data.find(value, at, end) if plain and 0 <= at <= end else -1
            if found < 0:
                raise Unindexable(
                    f"the column {name} is compressed, or not plain: its rows have no place"
                )
            offsets.append(found + 4)
            at = found + 4 + size_at(value)
        return offsets

    def tables(self, successors: bytes) -> tuple[int, int]:
        """Offset and bytes of the tables: version 1 has them in the footer."""
        if successors:
            return self.column(0, "successors", [successors])[0], size_at(successors)
        ranks = (self.metadata.metadata or {}).get(b"ranks")
        if ranks is None:
            return 0, 0  # version 2 without rows, and version 3, whose tables are the dump's
        found = self.data.rfind(ranks)
        if found < 0:
            raise CorruptShard("the footer's rank table is not in the file")
        return found, len(ranks)
