"""Learning the tables of version 3 from rows.

Probabilities are counted on rows that the lists of successors do not know (four-fold), so they hold
for other text of the same kind. Counted on the rows of the lists themselves, ids that are listed
because they stand there would seem sure.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.codec.root_grid import RootGrid
from storage.codec.v1 import Ranks
from storage.codec.v3_tables import Tables, compiled, list_order
from storage.targets import Bools, Int64s, positions_of
from storage.topk import Int32s, UInt16s

Integers = npt.NDArray[np.integer]
SEEN = 2  # times; a successor seen once is not listed
FOLDS = 4
KIND_CHANCES = (0.02, 0.05, 0.12, 0.25, 0.45, 0.7, 0.9)
KIND_LEVELS = (0.15, 0.3, 0.42, 0.55, 0.68, 0.8, 0.9)  # quantiles
ROOT_SHARES = (0.25, 0.5, 0.75, 0.9)  # quantiles, too
PER_OCTAVE = 64  # of the ratio of a root to the smallest one
WEIGHT = 4.0  # symbols that the mean over a group of contexts counts for


class Text(NamedTuple):
    """The rows that are learnt from, joined.

    begins   int64 [rows + 1]  where the positions of each row begin
    tokens   int32 [P]
    offsets  int64 [P + 1]  where the entries of each position begin
    ids      int32 [E]
    levels   uint16 [E]  see octaves
    """

    begins: Int64s
    tokens: Int32s
    offsets: Int64s
    ids: Int32s
    levels: UInt16s


def joined(rows: Sequence[tuple[Int32s, RootGrid]], masks: Sequence[Bools | None]) -> Text:
    """The rows, without the tokens whose distributions are not stored."""
    grids = [grid for _, grid in rows]
    tokens = [
        input_ids[positions_of(targets, len(input_ids))]
        for (input_ids, _), targets in zip(rows, masks, strict=True)
    ]
    none = np.zeros(0, np.int32)
    counts = np.concatenate([none, *(grid.counts for grid in grids)])
    entries = np.cumsum([0, *(len(grid.ids) for grid in grids)])
    ids, levels = np.empty(entries[-1], np.int32), np.empty(entries[-1], np.uint16)
    for grid, begin, end in zip(grids, entries, entries[1:], strict=False):
        ids[begin:end], levels[begin:end] = grid.ids, octaves(grid)
    return Text(
        np.cumsum([0, *map(len, tokens)]),
        np.concatenate([none, *tokens]),
        np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        ids,
        levels,
    )


def learn(
    rows: Sequence[tuple[Int32s, RootGrid]],
    vocab_size: int,
    masks: Sequence[Bools | None] | None = None,
) -> Tables:
    """Tables from the (input_ids, grid) of rows, and their masks."""
    kernels = compiled()
    masks = [None] * len(rows) if masks is None else masks
    grids = [grid for _, grid in rows]
    ranks, edges = learn_ranks(grids, vocab_size), learn_edges(grids)
    flags = np.zeros((kernels.FLAGS, 2), np.int64)
    numbers = np.zeros((kernels.NUMBERS, kernels.SYMBOLS), np.int64)
    even = to_chances(flags), to_sums(numbers)
    text, raw = joined(rows, masks), 0
    level_edges = quantiles(np.array_split(text.levels, len(rows) + 1), KIND_LEVELS)
    by_token = np.argsort(text.tokens, kind="stable")
    for begin, end in folds(len(rows)):
        inside = (by_token >= text.begins[begin]) & (by_token < text.begins[end])
        outside = by_token if inside.all() else by_token[~inside]
        lists = list_successors(text, outside, level_edges, ranks)
        plain = Tables(ranks, *lists, *edges, *even, learnt=0, cost=0.0)
        for i in range(begin, end):
            contexts, symbols = plain.row(rows[i][0], masks[i]).symbols(grids[i])
            kernels.count(contexts, symbols, flags, numbers)
            raw += int((contexts[contexts >= kernels.RAW] - kernels.RAW).sum())
    chances, sums = to_chances(flags), to_sums(numbers)
    bits = raw + information(flags, numbers, chances, sums)
    cost = bits / max(len(text.ids), 1)
    lists = list_successors(text, by_token, level_edges, ranks)
    return Tables(ranks, *lists, *edges, chances, sums, len(text.tokens), cost)


def folds(rows: int) -> list[tuple[int, int]]:
    """The (begin, end) of rows that are counted while their successors are listed from the others.

    Few rows are one part, and are listed from themselves.
    """
    if rows < 2 * FOLDS:
        return [(0, rows)] if rows else []
    ends = [rows * fold // FOLDS for fold in range(FOLDS + 1)]
    return list(itertools.pairwise(ends))


def information(flags: Integers, numbers: Integers, chances: UInt16s, sums: UInt16s) -> float:
    """Bits that the counted symbols take."""
    one = compiled().ONE
    yes = chances.astype(np.float64) / one
    widths = np.diff(sums.astype(np.float64), axis=1) / one
    bits = (flags * np.log2(np.stack([yes, 1 - yes], 1))).sum()
    return -float(bits + (numbers * np.log2(widths)).sum())


def learn_ranks(grids: Sequence[RootGrid], vocab_size: int) -> Ranks:
    """Ids by how often they are kept."""
    return Ranks.learn(grids, vocab_size)  # type: ignore[arg-type]


def floors(grid: RootGrid) -> Integers:
    """[P] the smallest root of each position, 0 without entries."""
    found = np.zeros(len(grid.counts), np.int64)
    filled = grid.counts > 0
    found[filled] = grid.roots[np.cumsum(grid.counts, dtype=np.int64)[filled] - 1]
    return found


def octaves(grid: RootGrid) -> Integers:
    """[E] the logarithm of each root over the smallest one of its position."""
    least = np.maximum(np.repeat(floors(grid), grid.counts), 1)
    ratio = np.log2(np.maximum(grid.roots, 1) / least) * PER_OCTAVE
    return np.asarray(np.maximum(ratio, 0).astype(np.uint16))


def learn_edges(grids: Sequence[RootGrid]) -> tuple[Int64s, Int64s]:
    """(scales, roots) of Tables: eight and five classes of about equal size."""
    none = np.zeros(0, np.int64)
    keys = np.concatenate([none, *((g.counts.astype(np.int64) << 16) + floors(g) for g in grids)])
    scales = np.quantile(keys, np.arange(1, 8) / 8, method="lower") if len(keys) else np.zeros(7)
    roots = quantiles((grid.roots for grid in grids), ROOT_SHARES)
    return scales.astype(np.int64) + 1, np.maximum(roots, 1)


def quantiles(parts: Iterable[UInt16s], shares: Sequence[float]) -> Int64s:
    """[len(shares)] quantiles of numbers in many parts, by counting them."""
    times = np.zeros(1 << 16, np.int64)
    for part in parts:
        found = np.bincount(part)
        times[: len(found)] += found
    if not times.any():
        return np.zeros(len(shares), np.int64)
    places = np.array(shares) * times.sum()
    return np.asarray(np.searchsorted(np.cumsum(times), places, side="right"), np.int64)


def list_successors(
    text: Text, order: Int64s, edges: Int64s, ranks: Ranks
) -> tuple[Int32s, Int32s, npt.NDArray[np.uint8]]:
    """(starts, listed, kinds) of Tables, from some of the positions, sorted by token.

    edges [7]: of the classes of levels
    """
    kernels = compiled()
    sizes, listed, times, means, of = kernels.tally(
        order, text.tokens, text.offsets, text.ids, text.levels, ranks.rank_of,
        SEEN, kernels.MOST_LISTED,
    )  # fmt: skip
    kinds = np.digitize(times / np.maximum(of, 1), KIND_CHANCES) * 8 + np.digitize(means, edges)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    order = list_order(starts, listed, kinds, ranks)
    return starts, listed[order], kinds[order].astype(np.uint8)


def to_chances(flags: Integers) -> UInt16s:
    """Counts of yes and no [FLAGS, 2] -> probability of yes [FLAGS], in 1/32768, never 0 or 1.

    The fewer counts a context has, the closer it is to the mean over candidates of its kind.
    """
    kernels = compiled()
    kinds = flags.reshape(kernels.KINDS, -1, 2)
    alike = (kinds.sum(axis=1) + 0.5) / (kinds.sum(axis=(1, 2)) + 1)[:, None]
    chances = (kinds[..., 0] + alike[:, :1]) / (kinds.sum(axis=2) + 1)
    one = kernels.ONE
    return np.asarray(np.clip(chances.reshape(-1) * one, 1, one - 1), np.uint16)


def to_sums(numbers: Integers) -> UInt16s:
    """Counts [NUMBERS, SYMBOLS] -> cumulative probabilities, each step at least 1.

    The fewer counts a context has, the closer it is to the mean over contexts of its group.
    """
    kernels = compiled()
    one, symbols = kernels.ONE, kernels.SYMBOLS
    share = np.empty(numbers.shape)
    for begin, end in zip(kernels.GROUPS, kernels.GROUPS[1:], strict=False):
        group = numbers[begin - kernels.FLAGS : end - kernels.FLAGS]
        alike = (group.sum(axis=0) + 1 / symbols) / (group.sum() + 1)
        share[begin - kernels.FLAGS : end - kernels.FLAGS] = (group + WEIGHT * alike) / (
            group.sum(axis=1, keepdims=True) + WEIGHT
        )
    widths = 1 + np.floor(share * (one - symbols)).astype(np.int64)
    widths[np.arange(len(widths)), widths.argmax(axis=1)] += one - widths.sum(axis=1)
    sums = np.zeros((len(numbers), symbols + 1), np.uint16)
    sums[:, 1:] = np.cumsum(widths, axis=1)
    return sums
