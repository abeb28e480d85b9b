"""Learning the tables of version 3 from rows.

Probabilities are counted on rows that the lists of successors do not know (four-fold), so they hold
for other text of the same kind. Counted on the rows of the lists themselves, ids that are listed
because they stand there would seem sure.
"""

from collections.abc import Iterator, Sequence

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
PER_OCTAVE = 64  # of the ratio of a root to the smallest one
WEIGHT = 4.0  # symbols that the mean over a group of contexts counts for


def learn(
    rows: Sequence[tuple[Int32s, RootGrid]],
    vocab_size: int,
    masks: Sequence[Bools | None] | None = None,
) -> Tables:
    """Tables from the (input_ids, grid) of rows, and their masks."""
    kernels = compiled()
    masks = [None] * len(rows) if masks is None else masks
    grids = [grid for _, grid in rows]
    tokens = [
        input_ids[positions_of(targets, len(input_ids))]
        for (input_ids, _), targets in zip(rows, masks, strict=True)
    ]
    ranks, edges = learn_ranks(grids, vocab_size), learn_edges(grids)
    flags = np.zeros((kernels.FLAGS, 2), np.int64)
    numbers = np.zeros((kernels.NUMBERS, kernels.SYMBOLS), np.int64)
    even = to_chances(flags), to_sums(numbers)
    raw = 0
    for inside, outside in folds(len(rows)):
        lists = list_successors([tokens[i] for i in outside], [grids[i] for i in outside], ranks)
        plain = Tables(ranks, *lists, *edges, *even, learnt=0, cost=0.0)
        for i in inside:
            contexts, symbols = plain.row(rows[i][0], masks[i]).symbols(grids[i])
            kernels.count(contexts, symbols, flags, numbers)
            raw += int((contexts[contexts >= kernels.RAW] - kernels.RAW).sum())
    chances, sums = to_chances(flags), to_sums(numbers)
    bits = raw + information(flags, numbers, chances, sums)
    entries = sum(len(grid.ids) for grid in grids)
    learnt = sum(len(grid.counts) for grid in grids)
    lists = list_successors(tokens, grids, ranks)
    return Tables(ranks, *lists, *edges, chances, sums, learnt, bits / max(entries, 1))


def folds(rows: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(rows to count, rows to list from): a quarter and the others. Of few rows all are both."""
    if rows < 2 * FOLDS:
        yield range(rows), range(rows)
        return
    for part in np.array_split(np.arange(rows), FOLDS):
        yield part.tolist(), [*range(part[0]), *range(part[-1] + 1, rows)]


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
    """(scales, roots) of Tables: eight and five classes of equal size."""
    none = np.zeros(0, np.int64)
    keys = np.concatenate([none, *((g.counts.astype(np.int64) << 16) + floors(g) for g in grids)])
    roots = np.concatenate([np.zeros(0, np.uint16), *(grid.roots for grid in grids)])
    scales = np.quantile(keys, np.arange(1, 8) / 8, method="lower") if len(keys) else np.zeros(7)
    edges = np.quantile(roots, (0.25, 0.5, 0.75, 0.9)) if len(roots) else np.zeros(4)
    return scales.astype(np.int64) + 1, np.maximum(edges, 1).astype(np.int64)


def list_successors(
    of_rows: Sequence[Int32s], grids: Sequence[RootGrid], ranks: Ranks
) -> tuple[Int32s, Int32s, npt.NDArray[np.uint8]]:
    """(starts, listed, kinds) of Tables, from the tokens [P] and the grid of each row."""
    none = np.zeros(0, np.int32)
    tokens = np.concatenate([none, *of_rows])
    counts = np.concatenate([none, *(grid.counts for grid in grids)])
    ids = np.concatenate([none, *(grid.ids for grid in grids)])
    levels = np.concatenate([np.zeros(0, np.uint16), *(octaves(grid) for grid in grids)])
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    edges = np.quantile(levels, KIND_LEVELS) if len(levels) else np.zeros(7)
    kernels = compiled()
    sizes, listed, times, means, of = kernels.tally(
        np.argsort(tokens, kind="stable"), tokens, offsets, ids, levels, ranks.rank_of,
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
