"""The sequences that each step of stage two sees: an endless stream, a pure function of the seed.

Item p of the stream holds one domain sequence and the general ones that go with it, from
independent shuffles. A run is resumed by its step number alone, on any number of ranks that makes
the same number of items per step.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import numpy as np
from torch.utils.data import Dataset, Sampler

from pipeline.data.orders import SHORT, permutation, place
from pipeline.errors import ConfigError
from pipeline.token_sequences import Tokens, TokenSequences
from storage import LogitDataset, Record

MixBy = Literal["sequences", "tokens"]
DOMAIN, GENERAL, BLOCKS = 0, 1, 2  # kinds of random numbers
ORDERS = 2  # version of the orders below, which checkpoints record
BLOCK = 1000  # general sequences in which several dumps stand in their exact proportion


class GeneralStream:
    """The rows of one or several dumps, without end. Every dump has its share of each block.

    A dump's rows come in a new order in each pass over it.
    """

    def __init__(self, dumps: Sequence[LogitDataset], weights: Sequence[float], seed: int) -> None:
        self.dumps, self.seed = list(dumps), seed
        self.shares = shares_of(dumps, weights)
        self._numbers = np.repeat(np.arange(len(self.dumps)), self.shares)

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
        number, before = 0, offset
        if len(self.dumps) > 1:
            numbers = self._numbers[permutation(BLOCK, self.seed, BLOCKS, block)[: offset + 1]]
            number = int(numbers[-1])
            before = int((numbers[:-1] == number).sum())
        size = len(self.dumps[number])
        epoch, index = divmod(block * self.shares[number] + before, size)
        return number, place(size, index, self.seed, GENERAL + 2 * number, epoch)

    @property
    def targets_a_row(self) -> float:
        """Targets of a row of the stream, on average over whole passes."""
        means = [float(dump.target_counts.mean()) for dump in self.dumps]
        return float(np.dot(self.shares, means)) / BLOCK

    def epochs(self, rows: int) -> list[float]:
        """Passes over each dump after this many rows of the stream."""
        shares = np.array(self.shares) / BLOCK
        return [rows * share / len(dump) for share, dump in zip(shares, self.dumps, strict=True)]


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
    counts general sequences per domain sequence, or general targets per domain target, on average
    over whole epochs of both; where a sequence has no mask, its targets are its tokens. An item
    costs the same anywhere in the stream, and nothing grows with the corpora.
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
        self.domain, self.general, self.seed = domain, general, seed
        self.epoch_items = -(-len(domain) // items_per_step) * items_per_step
        self.mix = mix if general is not None else 0.0
        self.rows_an_item = self.mix
        """General sequences of an item, on average."""
        if general is not None and mix_by == "tokens":
            self.rows_an_item *= domain.target_count / len(domain) / general.targets_a_row

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
            size = len(self.domain)
            domain.append(self.domain[place(size, at % size, self.seed, DOMAIN, epoch)])
        if self.general is None:
            return [Item(sequence, []) for sequence in domain]
        rows = [range(self.general_rows(item), self.general_rows(item + 1)) for item in items]
        records = iter(self.general.records(chain.from_iterable(rows)))
        return [
            Item(sequence, list(islice(records, len(own))))
            for sequence, own in zip(domain, rows, strict=True)
        ]

    @property
    def orders_are_new(self) -> bool:
        """Whether orders of version 1 were others: those of short corpora mixed by sequences are
        the same."""
        sizes = [len(self.domain), *map(len, self.general.dumps if self.general else [])]
        return self.rows_an_item != self.mix or max(sizes) > SHORT

    def general_rows(self, items: int) -> int:
        """Rows of the general stream that the first `items` items hold."""
        return int(items * self.rows_an_item)

    def epochs(self, items: int) -> dict[str, float]:
        """Passes over each corpus after this many items, by name."""
        found = {"domain_epochs": items / self.epoch_items}
        if self.general is not None:
            passes = self.general.epochs(self.general_rows(items))
            names = ["general_epochs"] if len(passes) == 1 else map(general_name, range(99))
            found |= dict(zip(names, passes, strict=False))
        return found


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
