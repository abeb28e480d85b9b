"""The tables of version 3, which are learnt once and serve many shards."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.codec import v2_tables, v3
from storage.codec.root_grid import RootGrid
from storage.targets import Bools
from storage.topk import Int32s

LEARN_POSITIONS = 1 << 17  # positions that tables are learnt from


@dataclass(frozen=True, eq=False)
class Row(v2_tables.Row):
    """The tables with one sequence, see v2_tables.Row."""


@dataclass(frozen=True, eq=False)
class Tables(v2_tables.Successors):
    """What `learn` found in the first rows of a dump, or of a part of it."""

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
        return super().learn(numbers, vocab_size, masks)  # type: ignore[return-value]
