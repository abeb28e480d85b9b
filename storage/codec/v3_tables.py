"""The tables of version 3, which are learnt once and serve many shards."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from storage.codec import v2_tables, v3
from storage.codec.root_grid import RootGrid
from storage.errors import CorruptPayload
from storage.targets import Bools
from storage.topk import Int32s

LEARN_POSITIONS = 1 << 17  # positions that tables are learnt from
END = struct.Struct("<Qd")  # learnt, cost


@dataclass(frozen=True, eq=False)
class Row(v2_tables.Row):
    """The tables with one sequence, see v2_tables.Row."""


@dataclass(frozen=True, eq=False)
class Tables(v2_tables.Successors):
    """What `learn` found in the first rows of a dump, or of a part of it.

    learnt  positions that they were learnt from
    cost    bits that an entry of the same kind of text takes
    """

    learnt: int = 0
    cost: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        arrays = (self.starts, self.listed, self.kinds, self.rank_kinds, self.sums, self.hints)
        ranks = (self.ranks.order, self.ranks.rank_of)
        return sum(int(array.nbytes) for array in (*ranks, *arrays))

    def row(self, input_ids: npt.ArrayLike, targets: Bools | None = None) -> Row:
        """The tables for one sequence, to encode and decode its distributions.

        `targets` bool [T] marks the tokens whose distributions are stored, None all of them.
        """
        return Row(self, np.require(input_ids, np.int32, ["C", "W"]), targets)

    @classmethod
    def learn(  # type: ignore[override]
        cls,
        rows: Sequence[tuple[Int32s, RootGrid]],
        vocab_size: int,
        masks: Sequence[Bools | None] | None = None,
    ) -> "Tables":
        """Learn from the (input_ids, grid) of rows, and their masks."""
        numbers = [(input_ids, v3.as_grid(grid)) for input_ids, grid in rows]
        found: Tables = super().learn(numbers, vocab_size, masks)  # type: ignore[assignment]
        masks = [None] * len(rows) if masks is None else masks
        size = sum(
            len(v3.pack(grid, found.row(input_ids, targets)))
            for (input_ids, grid), targets in zip(rows, masks, strict=True)
        )
        entries = sum(len(grid.ids) for _, grid in rows)
        positions = sum(len(grid.counts) for _, grid in rows)
        return replace(found, learnt=positions, cost=8 * size / max(entries, 1))

    def pack(self) -> bytes:
        """The tables as bytes."""
        return super().pack() + END.pack(self.learnt, self.cost)

    @classmethod
    def unpack(cls, data: bytes, vocab_size: int | None = None) -> "Tables":
        """The inverse of pack. Raises CorruptPayload."""
        if len(data) < END.size:
            raise CorruptPayload(f"tables of {len(data)} bytes")
        found: Tables = super().unpack(data[: -END.size], vocab_size)  # type: ignore[assignment]
        learnt, cost = END.unpack(data[-END.size :])
        return replace(found, learnt=learnt, cost=cost)
