"""Samples: ids drawn from the tail of each position, an unbiased estimate of its distribution.

With N draws from the distribution outside the kept ids, an id that is drawn c times stands for the
mass tail · c / N. The expectation of this mass is the id's own probability (arXiv 2503.16870).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UInt16s = npt.NDArray[np.uint16]
Int32s = npt.NDArray[np.int32]
MOST_DRAWS = 65_535


@dataclass(frozen=True, eq=False)
class Samples:
    """`draws` ids from each position that has a tail, ragged over positions.

    draws   N, 1 to 65535
    counts  uint16 [P]  different ids drawn at each position; 0 without a tail
    ids     int32  [S]  S = counts.sum(); ascending within a position
    times   uint16 [S]  how often each id was drawn; the sum over a position is N
    """

    draws: int
    counts: UInt16s
    ids: Int32s
    times: UInt16s

    @classmethod
    def from_drawn(cls, drawn: npt.ArrayLike) -> "Samples":
        """From drawn ids [P, N], in any order, repeated; all -1 at a position without a tail."""
        rows = np.sort(np.asarray(drawn, np.int32), axis=1)
        new = np.ones(rows.shape, bool)
        new[:, 1:] = rows[:, 1:] != rows[:, :-1]
        new &= rows >= 0
        draws = rows.shape[1]
        starts = np.flatnonzero(new)  # of runs of equal ids, over all rows
        row_ends = (starts // max(draws, 1) + 1) * draws
        ends = np.minimum(np.append(starts[1:], rows.size)[: len(starts)], row_ends)
        counts = new.sum(axis=1).astype(np.uint16)
        return cls(draws, counts, rows[new], (ends - starts).astype(np.uint16))

    def same(self, other: "Samples") -> bool:
        """Whether both hold equal values."""
        return self.draws == other.draws and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("counts", "ids", "times")
        )


def fault(samples: Samples, vocab_size: int) -> str | None:
    """What is wrong with the samples, naming the first position; None if they are valid."""
    counts, ids, times = samples.counts, samples.ids, samples.times
    entries = int(counts.sum(dtype=np.int64))
    if not 1 <= samples.draws <= MOST_DRAWS:
        return f"{samples.draws} draws, expected 1 to {MOST_DRAWS}"
    if not entries == len(ids) == len(times):
        return f"counts sum to {entries} samples, found {len(ids)} ids and {len(times)} times"
    position = np.repeat(np.arange(len(counts)), counts)
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        at = outside[0]
        return f"position {position[at]}: id {ids[at]} is outside the vocabulary of {vocab_size}"
    disorder = np.flatnonzero((np.diff(ids) <= 0) & (np.diff(position) == 0))
    if len(disorder):
        return f"position {position[disorder[0]]}: sampled ids are not in ascending order"
    drawn = np.bincount(position, weights=times, minlength=len(counts))
    wrong = np.flatnonzero(drawn != np.where(counts > 0, samples.draws, 0))
    if len(wrong):
        at = wrong[0]
        return f"position {at}: {drawn[at]:.0f} draws, expected {samples.draws}"
    never = np.flatnonzero(times == 0)
    if len(never):
        at = never[0]
        return f"position {position[at]}: id {ids[at]} was drawn 0 times; leave it out"
    return None
