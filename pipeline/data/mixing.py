"""The sequences that each step of stage two sees: an endless stream, a pure function of the seed.

Item p of the stream holds one domain sequence and the general ones that go with it, from
independent shuffles. A run is resumed by its step number alone, on any number of ranks that makes
the same number of items per step.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Literal

import numpy as np
from torch.utils.data import Dataset, Sampler

from pipeline.errors import ConfigError
from pipeline.token_sequences import Tokens, TokenSequences
from pipeline.types import Int64s
from storage import LogitDataset, Record

MixBy = Literal["sequences", "tokens"]
DOMAIN, GENERAL, BLOCKS = 0, 1, 2  # kinds of random numbers
BLOCK = 1000  # general sequences in which several dumps stand in their exact proportion


@lru_cache(maxsize=16)
def shuffled(size: int, *seed: int) -> Int64s:
    """The order of `size` items in one epoch of a stream."""
    return np.random.default_rng(seed).permutation(size)


class GeneralStream:
    """The rows of one or several dumps, without end. Every dump has its share of each block.

    A dump's rows come in a new order in each pass over it.
    """

    def __init__(self, dumps: Sequence[LogitDataset], weights: Sequence[float], seed: int) -> None:
        self.dumps, self.seed = list(dumps), seed
        self.shares = shares_of(dumps, weights)
        self._starts = [0]  # targets before each block that was asked for, and the next
        self._last_block: tuple[int, Int64s, Int64s] | None = None

    def records(self, rows: Iterable[int]) -> list[Record]:
        """Rows of the stream. Those of a remote dump are requested at the same time."""
        places = [self._place(row) for row in rows]
        found: dict[tuple[int, int], Record] = {}
        for number, dump in enumerate(self.dumps):
            own = sorted({index for which, index in places if which == number})
            found |= {(number, index): row for index, row in zip(own, dump.read(own), strict=True)}
        return [found[place] for place in places]

    def _place(self, at: int) -> tuple[int, int]:
        """(number of the dump, index of its row) of row `at` of the stream."""
        block, offset = divmod(at, BLOCK)
        numbers, indices = self._block(block)
        return int(numbers[offset]), int(indices[offset])

    def rows_within(self, targets: int) -> int:
        """Number of rows from the start that hold at most this many targets."""
        while self._starts[-1] <= targets:
            counts = self._target_counts(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + int(counts.sum()))
        block = bisect_right(self._starts, targets) - 1
        ends = self._starts[block] + np.cumsum(self._target_counts(block))
        return block * BLOCK + int(np.searchsorted(ends, targets, side="right"))

    def epochs(self, rows: int) -> list[float]:
        """Passes over each dump after this many rows of the stream."""
        shares = np.array(self.shares) / BLOCK
        return [rows * share / len(dump) for share, dump in zip(shares, self.dumps, strict=True)]

    def _block(self, block: int) -> tuple[Int64s, Int64s]:
        """(number of the dump [BLOCK], index of its row [BLOCK])"""
        if self._last_block is not None and self._last_block[0] == block:
            return self._last_block[1:]
        kinds = np.repeat(np.arange(len(self.dumps)), self.shares)
        numbers = kinds[shuffled(BLOCK, self.seed, BLOCKS, block)]
        indices = np.empty(BLOCK, np.int64)
        for number, (dump, share) in enumerate(zip(self.dumps, self.shares, strict=True)):
            at = np.arange(block * share, (block + 1) * share)
            indices[numbers == number] = [
                shuffled(len(dump), self.seed, GENERAL + 2 * number, epoch)[index]
                for epoch, index in zip(*divmod(at, len(dump)), strict=True)
            ]
        self._last_block = block, numbers, indices
        return numbers, indices

    def _target_counts(self, block: int) -> Int64s:
        numbers, indices = self._block(block)
        counts = np.empty(BLOCK, np.int64)
        for number, dump in enumerate(self.dumps):
            own = numbers == number
            counts[own] = dump.target_counts[indices[own]]
        return counts


def shares_of(dumps: Sequence[LogitDataset], weights: Sequence[float]) -> list[int]:
    """Rows of each dump in a block; ConfigError for a dump that would never be read."""
    shares = apportion(weights, BLOCK)
    for index, (dump, share) in enumerate(zip(dumps, shares, strict=True)):
        if share == 0:
            raise ConfigError(
                f"dump {dump.dump.store.path}: its weight {weights[index]:g} of {sum(weights):g} "
                f"is under one row in {BLOCK}, so it would never be read. Give it a weight of "
                f"{smallest_weight(weights, index, BLOCK):g} or more, or leave it out"
            )
    return shares


def smallest_weight(weights: Sequence[float], index: int, total: int) -> float:
    """A weight, to three digits, that gives this one a share beside the others, and barely so."""

    def works(weight: float) -> bool:
        return apportion([*weights[:index], weight, *weights[index + 1 :]], total)[index] > 0

    low, high = weights[index], sum(weights)  # as much as all together always works
    while high > low * 1.0001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if works(middle) else (middle, high)
    digit = 10.0 ** (math.floor(math.log10(high)) - 2)
    steps = math.ceil(high / digit)
    while not works(steps * digit):  # the others' remainders move too
        steps += 1
    return steps * digit


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportion of the weights that sum to `total`: largest remainders."""
    exact = np.array(weights) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    for index in np.argsort(shares - exact, kind="stable")[: total - shares.sum()]:
        shares[index] += 1
    return [int(share) for share in shares]


@dataclass(frozen=True)
class Item:
    """What one item of the stream adds to a batch."""

    domain: Tokens
    general: list[Record]


class MixedDataset(Dataset[Item]):
    """Item p of the stream, for any p >= 0.

    An epoch is `epoch_items` items: the domain's sequences in a new order, begun again where the
    epoch was rounded up to whole optimizer steps. The general stream continues across epochs. `mix`
    counts general sequences per domain sequence, or general targets per domain target; where a
    sequence has no mask, its targets are its tokens.
    """

    def __init__(
        self,
        domain: TokenSequences,
        general: GeneralStream | None,
        mix: float,
        seed: int,
        items_per_step: int,
        mix_by: MixBy = "sequences",
    ) -> None:
        self.domain, self.general, self.seed, self.mix_by = domain, general, seed, mix_by
        self.mix = mix if general is not None else 0.0
        self.epoch_items = -(-len(domain) // items_per_step) * items_per_step
        self._epoch_starts = [0]  # domain targets before each epoch that was asked for
        self._last_epoch: tuple[int, Int64s] | None = None

    def __len__(self) -> int:
        return self.epoch_items

    def __getitem__(self, item: int) -> Item:
        (found,) = self.__getitems__([item])
        return found

    def __getitems__(self, items: Sequence[int]) -> list[Item]:
        """Several items, as a loader asks for them: their general rows are read together."""
        domain = []
        for item in items:
            epoch, at = divmod(item, self.epoch_items)
            order = self._shuffled(epoch)
            domain.append(self.domain[int(order[at % len(order)])])
        if self.general is None:
            return [Item(sequence, []) for sequence in domain]
        rows = [range(self.general_rows(item), self.general_rows(item + 1)) for item in items]
        records = iter(self.general.records(chain.from_iterable(rows)))
        return [
            Item(sequence, list(islice(records, len(own))))
            for sequence, own in zip(domain, rows, strict=True)
        ]

    def general_rows(self, items: int) -> int:
        """Rows of the general stream that the first `items` items hold."""
        if self.general is None:
            return 0
        if self.mix_by == "sequences":
            return int(items * self.mix)
        return self.general.rows_within(int(self.mix * self._domain_targets(items)))

    def epochs(self, items: int) -> dict[str, float]:
        """Passes over each corpus after this many items, by name."""
        found = {"domain_epochs": items / self.epoch_items}
        if self.general is not None:
            passes = self.general.epochs(self.general_rows(items))
            names = ["general_epochs"] if len(passes) == 1 else map(general_name, range(99))
            found |= dict(zip(names, passes, strict=False))
        return found

    def _order(self, epoch: int) -> Int64s:
        """The domain sequence of each of the epoch's items."""
        order = self._shuffled(epoch)
        return order[np.arange(self.epoch_items) % len(order)]

    def _shuffled(self, epoch: int) -> Int64s:
        """Each domain sequence once, in the order of the epoch."""
        return shuffled(len(self.domain), self.seed, DOMAIN, epoch)

    def _domain_targets(self, items: int) -> int:
        """Domain targets of the first `items` items."""
        epoch, at = divmod(items, self.epoch_items)
        while len(self._epoch_starts) <= epoch:
            last = self._target_starts(len(self._epoch_starts) - 1)[-1]
            self._epoch_starts.append(self._epoch_starts[-1] + int(last))
        return self._epoch_starts[epoch] + int(self._target_starts(epoch)[at])

    def _target_starts(self, epoch: int) -> Int64s:
        """Domain targets of the epoch before each of its items, and of all of them."""
        if self._last_epoch is None or self._last_epoch[0] != epoch:
            ends = np.cumsum(self.domain.target_counts[self._order(epoch)])
            self._last_epoch = epoch, np.concatenate([np.zeros(1, np.int64), ends])
        return self._last_epoch[1]


def general_name(number: int) -> str:
    return f"general_{number}_epochs"


class EpochSampler(Sampler[int]):
    """The items of one epoch, in order; `epoch` is set before each."""

    def __init__(self, dataset: MixedDataset) -> None:
        self.items, self.epoch = len(dataset), 0

    def __len__(self) -> int:
        return self.items

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.items, (self.epoch + 1) * self.items))
