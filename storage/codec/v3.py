"""Payload version 3: a grid of roots. Coded by version 2's coder, until it has its own."""

import numpy as np

from storage.codec import v2
from storage.codec.frames import Header
from storage.codec.grid import Grid
from storage.codec.root_grid import RootGrid
from storage.codec.v2_tables import Row


def pack(grid: RootGrid, row: Row) -> bytes:
    """Encode a grid. Raises InvalidRecord if `row` has another length or vocabulary."""
    return v2.pack(as_grid(grid), row)


def unpack(header: Header, data: bytes, row: Row | None) -> RootGrid:
    """The inverse of pack. Raises CorruptPayload."""
    grid = v2.unpack(header, data, row)
    roots = np.repeat(grid.best, grid.counts) - grid.below
    coded = grid.tails.astype(np.int64)
    tails = np.where(coded & 1, -(coded >> 1) - 1, coded >> 1).astype(np.int32)
    return RootGrid(
        grid.step, grid.vocab_size, grid.counts, grid.ids, roots.astype(np.uint16), tails
    )


def as_grid(grid: RootGrid) -> Grid:
    """The same numbers in the places of a grid of logarithms."""
    best = np.zeros(len(grid.counts), np.int64)
    filled = grid.counts > 0
    best[filled] = grid.roots[(np.cumsum(grid.counts, dtype=np.int64) - grid.counts)[filled]]
    below = np.repeat(best, grid.counts) - grid.roots
    tails = np.where(grid.tails < 0, -2 * grid.tails.astype(np.int64) - 1, 2 * grid.tails)
    return Grid(grid.step, grid.vocab_size, grid.counts, grid.ids, below, best, tails)
