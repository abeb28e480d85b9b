"""Log-probabilities as whole multiples of a step in nats, and back."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from storage.errors import CorruptPayload, InvalidRecord
from storage.topk import Int32s, TopK, UInt16s, check_topk, position_sums

Integers = npt.NDArray[np.integer]
MAX_STEP = 8  # nats, exclusive
MAX_GRID = 1 << 32  # grid points, exclusive


@dataclass(frozen=True, eq=False)
class Grid:
    """A TopK whose log-probabilities lie `step` nats apart.

    counts  uint16 [P]
    ids     int32  [E]
    below   [E]  grid points between an entry and the best one of its position; never decreases
    best    [P]  round(-logprob / step) of the best entry; 0 without entries
    tails   [P]  0 for no tail, else 1 + round(-tail / step)
    """

    step: float
    vocab_size: int
    counts: UInt16s
    ids: Int32s
    below: Integers
    best: Integers
    tails: Integers

    @property
    def spreads(self) -> Integers:
        """[P] grid points between the best and the last entry of each position."""
        spreads = np.zeros(len(self.counts), self.below.dtype)
        filled = self.counts > 0
        spreads[filled] = self.below[np.cumsum(self.counts, dtype=np.int64)[filled] - 1]
        return spreads

    def narrow(self) -> "Grid":
        """The same grid with two bytes per number of `below`, if they fit."""
        if int(self.below.max(initial=0)) > 65535:
            return self
        return replace(self, below=self.below.astype(np.uint16))

    def same(self, other: object) -> bool:
        """Whether both hold the same distributions; equally likely ids may be in any order."""
        if not isinstance(other, Grid) or not np.array_equal(self.counts, other.counts):
            return False
        numbers = [(self.below, other.below), (self.best, other.best), (self.tails, other.tails)]
        if not all(np.array_equal(left, right) for left, right in numbers):
            return False
        return same_levels(self.counts, self.below, self.ids, other.ids)


def same_levels(counts: UInt16s, levels: Integers, ids: Int32s, others: Int32s) -> bool:
    """Whether each position has the same ids [E] at each of its levels [E], in any order."""
    if len(ids) != len(others):
        return False
    # Number each level of each position, so that its ids are compared as a set. What agrees in
    # place need not be sorted.
    begins = np.ones(len(ids) + 1, bool)
    np.not_equal(levels[1:], levels[:-1], out=begins[1:-1])
    begins[np.cumsum(counts, dtype=np.int64)] = True
    apart = ids != others
    group = np.cumsum(begins[:-1])[apart] << 32
    return np.array_equal(np.sort(group + ids[apart]), np.sort(group + others[apart]))


def check_best(below_itself: npt.NDArray[np.bool_], filled: npt.NDArray[np.bool_]) -> None:
    """Raise CorruptPayload if the best entry of a filled position is below itself.

    Then all entries could round to a mass of 0, and the log-probabilities to infinity. With it
    they are finite, whatever the other numbers say.
    """
    if below_itself.any():
        at = np.flatnonzero(filled)[np.flatnonzero(below_itself)[0]]
        raise CorruptPayload(f"position {at}: its best entry is below itself")


def quantise(topk: TopK, vocab_size: int, step: float) -> Grid:
    """Round to the grid. Raises InvalidRecord unless it is a distribution over vocab_size ids."""
    if not 0 < step < MAX_STEP:
        raise InvalidRecord(f"step must be between 0 and {MAX_STEP} nats, found {step}")
    check_topk(topk, vocab_size)
    positions, filled = len(topk), topk.counts > 0
    grid = np.rint(np.maximum(-topk.logprobs.astype(np.float64), 0) / step).astype(np.int64)
    first = (np.cumsum(topk.counts, dtype=np.int64) - topk.counts)[filled]
    best = np.zeros(positions, np.int64)
    best[filled] = grid[first]
    tails = np.zeros(positions, np.int64)
    some = np.isfinite(topk.tail_logprob)
    tails[some] = 1 + np.rint(np.maximum(-topk.tail_logprob[some].astype(np.float64), 0) / step)
    if max(int(grid.max(initial=0)), int(tails.max(initial=0))) >= MAX_GRID:
        raise InvalidRecord(
            f"a log-probability is below {-step * MAX_GRID:g} nats, the lowest grid point; use a "
            f"larger step than {step:g}"
        )
    below = grid - np.repeat(best, topk.counts)
    return Grid(step, vocab_size, topk.counts, topk.ids, below, best, tails)


def dequantise(grid: Grid) -> TopK:
    """The distributions of a grid, each normalised over its entries and its tail.

    Entries are taken relative to the best one of their position, so that no sum underflows.
    """
    counts, positions = grid.counts, len(grid.counts)
    logprobs = grid.below.astype(np.float32)
    logprobs *= np.float32(-grid.step)
    mass = position_sums(np.exp(logprobs), counts)
    heads = -grid.step * grid.best.astype(np.float64)
    tail = np.where(grid.tails == 0, -np.inf, -grid.step * (grid.tails.astype(np.float64) - 1))
    with np.errstate(divide="ignore"):  # the log of an empty position's mass
        log_mass = heads + np.log(mass)
    log_sum = np.logaddexp(log_mass, tail)
    shift = (heads - log_sum).astype(np.float32)
    if positions and len(logprobs) == positions * int(counts[0]) and (counts == counts[0]).all():
        logprobs.reshape(positions, -1)[...] += shift[:, None]
    else:
        logprobs += np.repeat(shift, counts)
    return TopK(counts, grid.ids, logprobs, (tail - log_sum).astype(np.float32))
