"""encode(TopK) -> bytes and decode(bytes) -> TopK. FORMAT.md is the specification.

Log-probabilities are rounded to a uniform grid in nats (storage.codec.grid). Version 1 renumbers
ids by frequency (storage.codec.v1). Version 2 codes ids from their context (storage.codec.v2).
"""

import numpy as np

from storage.codec import v1 as ranked
from storage.codec import v2 as contextual
from storage.codec.frames import Header, Limits
from storage.codec.grid import Grid, dequantise, quantise
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import Row, fits
from storage.errors import CorruptPayload
from storage.topk import TopK

VERSIONS = (ranked.VERSION, contextual.VERSION)
STEPS = {"v1": 1 / 16, "v2": 1 / 16, "v3": 1 / 16}  # the spacing of each codec's grid by default


def encode(
    topk: TopK, *, vocab_size: int, step: float = 1 / 16, ranks: Ranks | Row | None = None
) -> bytes:
    """Compress one sequence's distributions.

    `step` is the grid's spacing in nats; decoding is off by at most step / 2 per log-probability
    before it renormalises. `ranks` chooses the version: a Row (`successors.row(input_ids,
    targets)`) gives version 2, in which entries that are equal on the grid come back by ascending
    id. Raises InvalidRecord if `topk` is not a distribution over `vocab_size` ids, or if `ranks`
    has another vocabulary or number of positions.
    """
    return pack(quantise(topk, vocab_size, step), ranks)


def decode(data: bytes, ranks: Ranks | Row | None = None, limits: Limits | None = None) -> TopK:
    """The inverse of encode, up to the grid; each position, with its tail, sums to one.

    `ranks` must be those that encoded the payload. `limits` are those of its row; without them, a
    payload may hold what its size allows. All numbers are finite, but for tails of -inf. Whatever
    the bytes, raises only CorruptPayload or FormatVersionError.
    """
    return dequantise(unpack(data, ranks, limits))


def pack(grid: Grid, ranks: Ranks | Row | None = None) -> bytes:
    """Encode a grid, see encode."""
    if isinstance(ranks, Row):
        if fits(grid):
            return contextual.pack(grid, ranks)
        ranks = ranks.successors.ranks
    return ranked.pack(grid, ranks)


def unpack(data: bytes, ranks: Ranks | Row | None = None, limits: Limits | None = None) -> Grid:
    """Decode a payload to its grid, see decode."""
    header = Header.unpack(data, VERSIONS, limits)
    if header.version == contextual.VERSION:
        grid = contextual.unpack(header, data, ranks if isinstance(ranks, Row) else None)
    else:
        grid = ranked.unpack(
            header, data, ranks.successors.ranks if isinstance(ranks, Row) else ranks
        )
    check_grid(grid, limits)
    return grid


def check_grid(grid: Grid, limits: Limits | None) -> None:
    """Raise CorruptPayload unless each position holds something, and no more than k entries."""
    empty = grid.counts == 0
    if empty.any() and (grid.tails[empty] == 0).any():
        at = np.flatnonzero(empty & (grid.tails == 0))[0]
        raise CorruptPayload(f"position {at}: no entry and no tail")
    most = int(grid.counts.max(initial=0))
    if limits is not None and most > limits.k:
        raise CorruptPayload(f"a position has {most} entries, the plan says k {limits.k}")
