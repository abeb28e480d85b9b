"""Which tables the rows of a version 3 shard are encoded with: those of the dump, or new ones.

The first rows of a shard are encoded with the tables of the shard before. If they take about the
bits that these tables expect of the text that they were learnt from, they serve the whole shard. If
not, the dump's other tables are tried, too. If none fit, the shard waits for more rows and learns
tables of its own, which serve other shards in turn; where a dump has several sets, the best one
serves, unless it takes far more. So one set serves text of one kind on any number of machines, and
other kinds get their own.

Writers do not wait for each other. Two that learn at the same time may both publish: then there are
two sets that do as well. A short shard takes the tables that cost the fewest bytes in all, those of
new tables included.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from storage.codec.v3_learning import learn
from storage.codec.v3_tables import Tables
from storage.errors import IncompleteDump
from storage.manifest import Partition
from storage.own_tables import Chosen
from storage.pending_row import PendingRow, learning

# What tables are learnt from: that many positions, or fewer with that many entries, which are in
# memory until then, in 6 bytes each, and in as many more while they are learnt from.
LEARN_POSITIONS, LEARN_ENTRIES = 196_608, 1 << 24
TRIED = 8  # tables of the dump, the newest ones
# Bits of an entry ÷ those that the tables expect. Measured on six kinds of text (SmolLM2-135M,
# learnt from 46,000 positions): 0.99 to 1.10 for rows of the same kind, 1.06 to 1.74 for others.
FITS = 1.05  # up to which tables are taken at once
SERVES = 1.25  # up to which the best of ENOUGH are taken
ENOUGH = 4
FEW = 32_768  # positions; tables learnt from fewer are for short shards
SHOWN = 16_384  # positions that show whether tables fit
LEAST = 2_048  # positions; learning from fewer costs more than it saves


class SharedTables:
    """Chooses the tables of shard `index` of a partition."""

    def __init__(self, partition: Partition, index: int) -> None:
        self.partition, self.index = partition, index
        self.tables, self.vocab_size = partition.dump.tables, partition.dump.tables.vocab_size
        self.ratios: dict[str, float] = {}  # of the tables that were tried, see FITS
        self.looked = False

    def choose(self, rows: Sequence[PendingRow], size: int, last: bool) -> Chosen | None:
        """See Chooser. Raises CorruptShard where the tables of the shard before are damaged."""
        if not rows:
            return Chosen(None, {}, None, {})
        found = None
        if last:
            found = self.fitting(rows, positions_in(rows)) or self.cheapest(rows)
        elif not self.looked:
            self.looked = True
            found = self.fitting(rows)
        elif enough(rows, size):
            found = self.new(rows)
        if found is None:
            return None
        return Chosen(self.tables.get(found), {"tables": found.encode()}, None, {"tables": found})

    def candidates(self, positions: int | None = None) -> Iterator[str]:
        """The sha256 of tables to try: those of the shard before, then the newest of the dump.

        Tables learnt from few positions are for a whole shard of `positions` that is not much
        larger.
        """
        seen: set[str] = set()
        for part in (self.of_shard_before, lambda: self.tables.recent[:1], self.newest):
            for sha256 in part():
                learnt = self.tables.get(sha256).learnt
                few = learnt < FEW and (positions is None or positions >= 2 * learnt)
                if sha256 not in seen and not few:
                    yield sha256
                seen.add(sha256)

    def of_shard_before(self) -> list[str]:
        with contextlib.suppress(IncompleteDump):  # it may still be in the committing thread
            if self.index:
                before = self.partition.shard(self.index - 1).tables
                return [before] if before else []
        return []

    def newest(self) -> list[str]:
        return self.tables.newest(TRIED)

    def fitting(self, rows: Sequence[PendingRow], positions: int | None = None) -> str | None:
        """The best of the candidates for these rows, if it is good enough."""
        entries = max(1, entries_in(rows))
        for sha256 in self.candidates(positions):
            if sha256 not in self.ratios:
                tables = self.tables.get(sha256)
                self.ratios[sha256] = bits_with(tables, rows) / max(entries * tables.cost, 1)
            if self.ratios[sha256] <= FITS:
                return sha256
        if len(self.ratios) < ENOUGH:
            return None
        best = min(self.ratios, key=lambda sha256: self.ratios[sha256])
        return best if self.ratios[best] <= SERVES else None

    def new(self, rows: Sequence[PendingRow]) -> str:
        """Tables learnt from these rows, unless another writer has published some that fit."""
        own = self.learnt(rows)
        return self.fitting(first_of(rows)) or self.published(own)

    def cheapest(self, rows: Sequence[PendingRow]) -> str:
        """The tables that cost the fewest bytes for a whole shard, new ones with their own."""
        positions = positions_in(rows)
        bits = {
            sha256: bits_with(self.tables.get(sha256), rows)
            for sha256 in self.candidates(positions)
        }
        best = min(bits, key=lambda sha256: bits[sha256], default=None)
        if best is not None and positions < LEAST:
            return best
        own = self.learnt(rows)
        if best is not None and bits[best] <= bits_with(own, rows) + 8 * len(own.pack()):
            return best
        return self.published(own)

    def learnt(self, rows: Sequence[PendingRow]) -> Tables:
        given, masks = learning(rows)
        return learn(given, self.vocab_size, masks)

    def published(self, tables: Tables) -> str:
        self.partition.dump.check_plan()
        return self.tables.publish(tables)


def enough(rows: Sequence[PendingRow], size: int) -> bool:
    """Whether tables can be learnt from these rows, whose `size` is that of `choose`."""
    return size >= LEARN_POSITIONS or (size >= FEW and entries_in(rows) >= LEARN_ENTRIES)


def entries_in(rows: Iterable[PendingRow]) -> int:
    """The entries of the distributions of these rows."""
    return sum(len(row.grid.ids) for row in rows)


def positions_in(rows: Iterable[PendingRow]) -> int:
    """The distributions of these rows."""
    return sum(len(row.grid.counts) for row in rows)


def first_of(rows: Sequence[PendingRow]) -> Sequence[PendingRow]:
    """As many of the rows as show whether tables fit."""
    ends = np.cumsum([len(row.grid.counts) for row in rows])
    return rows[: int(np.searchsorted(ends, SHOWN)) + 1]


def bits_with(tables: Tables, rows: Sequence[PendingRow]) -> int:
    """Bits of the coded entries of these rows, as `Tables.cost` counts them."""
    given, masks = learning(rows)
    coded = (
        tables.row(ids, mask).write(grid) for (ids, grid), mask in zip(given, masks, strict=True)
    )
    return sum(16 * len(words) for words in coded)
