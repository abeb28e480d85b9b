"""encode(TopK) -> bytes and decode(bytes) -> TopK. FORMAT.md is the specification.

Version 1 and 2 round log-probabilities to a uniform grid in nats (storage.codec.grid), version 3
the roots of probabilities (storage.codec.root_grid). Version 1 renumbers ids by frequency; version
2 and 3 code them from their context (storage.codec.v2, v3).
"""

import numpy as np

from storage.codec import grid as log_grid
from storage.codec import root_grid, v3, v3_tables
from storage.codec import v1 as ranked
from storage.codec import v2 as contextual
from storage.codec.frames import Header, Limits
from storage.codec.grid import Grid
from storage.codec.root_grid import RootGrid
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import Row, Successors, fits
from storage.errors import CorruptPayload, InvalidRecord
from storage.targets import Bools
from storage.topk import Int32s, TopK

VERSIONS = (ranked.VERSION, contextual.VERSION, v3.VERSION)
# The spacing of each codec's grid by default: nats, and for version 3 units of √p.
STEPS = {"v1": 1 / 16, "v2": 1 / 16, "v3": 1 / 416}
AnyGrid = Grid | RootGrid
AnyTables = Ranks | Successors | v3_tables.Tables
Known = Ranks | Row | v3_tables.Row


def encode(
    topk: TopK, *, vocab_size: int, step: float | None = None, ranks: Known | None = None
) -> bytes:
    """Compress one sequence's distributions.

    `ranks` chooses the version: nothing or Ranks give version 1, a Row of tables (`tables.row(
    input_ids, targets)`) version 2 or 3. Entries that are equal on the grid come back by ascending
    id in version 2, and in any order in version 3.
    `step` is the grid's spacing, by default that of STEPS: nats in version 1 and 2, where decoding
    is off by at most step / 2 per log-probability before it renormalises; units of √p in version 3,
    where √p is, and entries that round to 0 are added to the tail.
    Raises InvalidRecord if `topk` is not a distribution over `vocab_size` ids, or if `ranks` has
    another vocabulary or number of positions.
    """
    codec = "v3" if isinstance(ranks, v3_tables.Row) else "v1"
    step = STEPS[codec] if step is None else step
    return pack(quantised(topk, vocab_size, step, codec), ranks)


def decode(data: bytes, ranks: Known | None = None, limits: Limits | None = None) -> TopK:
    """The inverse of encode, up to the grid; each position, with its tail, sums to one.

    `ranks` must be those that encoded the payload. `limits` are those of its row; without them, a
    payload may hold what its size allows. All numbers are finite, but for tails of -inf. Whatever
    the bytes, raises only CorruptPayload or FormatVersionError.
    """
    return restored(unpack(data, ranks, limits))


def tables_of_row(tables: AnyTables, input_ids: Int32s, targets: Bools | None) -> Known:
    """What codes one row with these tables, see encode."""
    return tables if isinstance(tables, Ranks) else tables.row(input_ids, targets)


def kept(topk: TopK, step: float, codec: str) -> TopK:
    """What the codec's grid holds of a record, see root_grid.kept; version 1 and 2 hold all."""
    return root_grid.kept(topk, step) if codec == "v3" else topk


def quantised(topk: TopK, vocab_size: int, step: float, codec: str) -> AnyGrid:
    """Round to the codec's grid. Raises InvalidRecord unless it is a distribution over the ids."""
    if codec == "v3":
        return root_grid.quantise(topk, vocab_size, step)
    return log_grid.quantise(topk, vocab_size, step)


def restored(grid: AnyGrid) -> TopK:
    """The distributions of a grid; each position, with its tail, sums to one."""
    if isinstance(grid, RootGrid):
        return root_grid.dequantise(grid)
    return log_grid.dequantise(grid)


def pack(grid: AnyGrid, ranks: Known | None = None) -> bytes:
    """Encode a grid, see encode. Raises InvalidRecord for a grid of another version."""
    if isinstance(grid, RootGrid) and isinstance(ranks, v3_tables.Row):
        return v3.pack(grid, ranks)
    if isinstance(grid, RootGrid) or isinstance(ranks, v3_tables.Row):
        raise InvalidRecord(
            "a grid of roots goes with tables of version 3, one of logarithms with the others; "
            f"found {type(grid).__name__} and {type(ranks).__name__}"
        )
    if isinstance(ranks, Row):
        if fits(grid):
            return contextual.pack(grid, ranks)
        ranks = ranks.successors.ranks
    return ranked.pack(grid, ranks)


def unpack(data: bytes, ranks: Known | None = None, limits: Limits | None = None) -> AnyGrid:
    """Decode a payload to its grid, see decode."""
    header = Header.unpack(data, VERSIONS, limits)
    grid: AnyGrid
    if header.version == v3.VERSION:
        grid = v3.unpack(header, data, ranks if isinstance(ranks, v3_tables.Row) else None)
    elif header.version == contextual.VERSION:
        grid = contextual.unpack(header, data, ranks if isinstance(ranks, Row) else None)
    else:
        if isinstance(ranks, Row):
            ranks = ranks.successors.ranks
        grid = ranked.unpack(header, data, ranks if isinstance(ranks, Ranks) else None)
    check_grid(grid, limits)
    return grid


def check_grid(grid: AnyGrid, limits: Limits | None) -> None:
    """Raise CorruptPayload unless each position holds something, and no more than k entries."""
    empty = grid.counts == 0
    if empty.any() and (grid.tails[empty] == 0).any():
        at = np.flatnonzero(empty & (grid.tails == 0))[0]
        raise CorruptPayload(f"position {at}: no entry and no tail")
    most = int(grid.counts.max(initial=0))
    if limits is not None and most > limits.k:
        raise CorruptPayload(f"a position has {most} entries, the plan says k {limits.k}")
