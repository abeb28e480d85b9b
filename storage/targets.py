"""Which tokens of a sequence are learnt, and the positions that predict them.

A mask, bool [T], marks the learnt tokens of a sequence of T tokens; None stands for all of them.
Nothing predicts the first token, so its mark has no meaning.
"""

import numpy as np
import numpy.typing as npt

from storage.errors import CorruptShard

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]


def positions_of(targets: Bools | None, tokens: int) -> Int64s:
    """int64 [P], ascending: the positions whose next token is learnt."""
    if targets is None:
        return np.arange(max(tokens - 1, 0))
    return np.flatnonzero(targets[1:])


def pack_mask(targets: Bools) -> bytes:
    """One bit for each token, the lowest first; that of token 0 and the spare ones are 0."""
    bits = np.packbits(targets, bitorder="little")
    bits[:1] &= 0xFE
    return bits.tobytes()


def unpack_mask(data: bytes, tokens: int) -> Bools:
    """The inverse of pack_mask. Raises CorruptShard unless it is the mask of a row."""
    expected = (tokens + 7) // 8
    if len(data) != expected:
        raise CorruptShard(
            f"a mask of {len(data)} bytes, expected {expected} for {tokens} tokens: one bit each"
        )
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").view(np.bool_)
    if bits[tokens:].any() or bits[:1].any():
        raise CorruptShard("the mask marks the first token, or one behind the last")
    if not bits.any():
        raise CorruptShard("the mask marks no token, expected at least one")
    return bits[:tokens]
