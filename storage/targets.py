"""Which tokens of a sequence are learnt, and the positions that predict them.

A mask, bool [T], marks the learnt tokens of a sequence of T tokens; None stands for all of them.
Nothing predicts the first token, so its mark has no meaning.
"""

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]


def positions_of(targets: Bools | None, tokens: int) -> Int64s:
    """int64 [P], ascending: the positions whose next token is learnt."""
    if targets is None:
        return np.arange(max(tokens - 1, 0))
    return np.flatnonzero(targets[1:])
