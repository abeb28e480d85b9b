"""Square roots of probabilities as whole multiples of a step, and back.

The KL that rounding costs is 2 Σ (Δ√p)² to second order, so equal steps of √p spend it evenly.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.codec.grid import Integers
from storage.codec.v2_tables import compiled
from storage.errors import InvalidRecord
from storage.topk import Floats, Int32s, TopK, UInt16s, check_topk

Doubles = npt.NDArray[np.float64]
MIN_STEP, MAX_STEP = 1 / 65535, 1.0  # units of √p
FAINT = 1 / 4  # steps that a root of 0 stands for
FINE = 32  # steps; a smaller root of a tail would be too coarse for its logarithm
PER_NAT = 16  # levels of the logarithm of such a tail
FAINTEST = 1 << 16  # levels; a smaller tail is stored as this one


@dataclass(frozen=True, eq=False)
class RootGrid:
    """A TopK whose probabilities have roots that are whole multiples of `step`.

    counts  uint16 [P]
    ids     int32  [E]
    roots   uint16 [E]  √p in steps; never increases within a position. 0 stands for FAINT steps
    tails   int32  [P]  0: no tail. Positive: its root in steps. -n: its log is (1 - n) / PER_NAT
    """

    step: float
    vocab_size: int
    counts: UInt16s
    ids: Int32s
    roots: UInt16s
    tails: Int32s

    def narrow(self) -> "RootGrid":
        """The same grid: it is narrow already."""
        return self

    def same(self, other: object) -> bool:
        """Whether both hold the same distributions; equally likely ids may be in any order."""
        if not isinstance(other, RootGrid) or self.step != other.step:
            return False
        if not np.array_equal(self.counts, other.counts):
            return False
        return (
            np.array_equal(self.tails, other.tails)
            and np.array_equal(self.roots, other.roots)
            and same_ids(self, other)
        )


def same_ids(grid: RootGrid, other: RootGrid) -> bool:
    """Whether each position of both, whose roots are the same, has the same ids at each root."""
    entries = int(grid.counts.sum(dtype=np.int64))
    if not entries == len(grid.roots) == len(grid.ids) == len(other.ids):
        return False
    ids, others = (np.require(each.ids, np.int32, ["C", "W"]) for each in (grid, other))
    roots = np.require(grid.roots, np.uint16, ["C", "W"])
    counts = np.require(grid.counts, np.uint16, ["C", "W"])
    return bool(compiled().same_entries(counts, roots, ids, others, grid.vocab_size))


def largest(step: float) -> int:
    """The root of a probability of 1."""
    return round(1 / step)


def kept(topk: TopK, step: float) -> TopK:
    """What the grid holds of a record: entries that round to 0 are added to the tail.

    The best entry of a position stays. So do all entries of a record with samples, because these
    are drawn from the tail as it is.
    """
    if topk.samples is not None or topk.logprobs.min(initial=0) >= 2 * math.log(step / 2):
        return topk  # as after a cut-off, which is higher
    return topk.cut((step / 2) ** 2)


def quantise(topk: TopK, vocab_size: int, step: float) -> RootGrid:
    """Round `kept(topk, step)` to the grid; `step` is in units of √p.

    Raises InvalidRecord unless it is a distribution over vocab_size ids.
    """
    if not MIN_STEP <= step <= MAX_STEP:
        raise InvalidRecord(f"step must be from 1/65535 to 1 (of the root of p), found {step}")
    check_topk(topk, vocab_size)
    topk = kept(topk, step)
    scaled = np.minimum(np.exp(topk.logprobs.astype(np.float64) / 2), 1) / step
    roots = np.rint(scaled).astype(np.uint16)
    first = (np.cumsum(topk.counts, dtype=np.int64) - topk.counts)[topk.counts > 0]
    least = 1 if topk.samples is None else 0
    roots = np.maximum(roots, least, out=roots)
    roots[first] = np.maximum(roots[first], 1)
    return RootGrid(
        step, vocab_size, topk.counts, topk.ids, roots, quantise_tails(topk.tail_logprob, step)
    )


def quantise_tails(tail_logprob: Floats, step: float) -> Int32s:
    """The tails [P] of a RootGrid: roots where these are fine, else levels of the logarithm."""
    nats = np.minimum(tail_logprob.astype(np.float64), 0)
    roots = np.rint(np.exp(nats / 2) / step)
    levels = np.minimum(np.rint(-PER_NAT * np.maximum(nats, -FAINTEST)), FAINTEST - 1)
    tails = np.where(roots >= FINE, roots, -1 - levels)
    return np.where(np.isneginf(nats), 0, tails).astype(np.int32)


def tail_logprobs(tails: Integers, step: float) -> Doubles:
    """Nats [P] of stored tails, before their position is normalised."""
    with np.errstate(divide="ignore"):
        roots = 2 * np.log(np.maximum(tails, 0) * step)
    return np.asarray(np.where(tails < 0, (1 + tails) / PER_NAT, roots))


def dequantise(grid: RootGrid) -> TopK:
    """The distributions of a grid, each normalised over its entries and its tail."""
    points = np.arange(1 + int(grid.roots.max(initial=0)), dtype=np.float64)
    points[0] = FAINT
    points *= grid.step
    mass = np.zeros(len(grid.counts))
    filled = grid.counts > 0
    starts = (np.cumsum(grid.counts, dtype=np.int64) - grid.counts)[filled]
    if len(starts):
        mass[filled] = np.add.reduceat(np.take(points**2, grid.roots), starts)
    tail = tail_logprobs(grid.tails, grid.step)
    with np.errstate(divide="ignore"):  # the log of an empty position's mass
        log_sum = np.logaddexp(np.log(mass), tail)
    logprobs = np.take((2 * np.log(points)).astype(np.float32), grid.roots)
    logprobs -= np.repeat(log_sum.astype(np.float32), grid.counts)
    return TopK(grid.counts, grid.ids, logprobs, (tail - log_sum).astype(np.float32))
