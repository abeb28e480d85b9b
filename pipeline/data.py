"""Stage two's data: which sequences each step sees, and their packed batches.

The stream of training items is endless and a pure function of the seed: item p holds one domain
sequence and `mix` general ones, from two independent shuffles. A run is resumed by its step number
alone, on any number of ranks that makes the same number of items per step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler

from pipeline.corpus import Corpus
from storage import LogitDataset, Record

Int32s = npt.NDArray[np.int32]
DOMAIN, GENERAL = 0, 1  # streams of random numbers


class TokenSequences:
    """A tokenized corpus in memory: one flat array of ids and where each sequence starts."""

    def __init__(self, corpus: Corpus) -> None:
        parts = [sequence.input_ids for sequence in corpus.sequences()]
        self.ids = np.concatenate([np.zeros(0, np.int32), *parts])
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[Int32s]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Int32s:
        return self.ids[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True)
class Item:
    """What one step of the stream adds to a batch."""

    domain: Int32s
    general: list[Record]


class MixedDataset(Dataset[Item]):
    """Item p of the stream, for any p >= 0.

    An epoch is `epoch_items` items: the domain's sequences in a new order, begun again where the
    epoch was rounded up to whole optimizer steps. The general stream goes on across epochs and
    shuffles anew each time it has been through.
    """

    def __init__(
        self,
        domain: TokenSequences,
        general: LogitDataset | None,
        mix: float,
        seed: int,
        items_per_step: int,
    ) -> None:
        self.domain, self.general, self.mix, self.seed = domain, general, mix, seed
        self.epoch_items = -(-len(domain) // items_per_step) * items_per_step

    def __len__(self) -> int:
        return self.epoch_items

    def __getitem__(self, item: int) -> Item:
        epoch, at = divmod(item, self.epoch_items)
        size = len(self.domain)
        index = int(shuffled(size, self.seed, DOMAIN, epoch)[at % size])
        first, stop = int(item * self.mix), int((item + 1) * self.mix)
        return Item(self.domain[index], [self.general_record(at) for at in range(first, stop)])

    def general_record(self, at: int) -> Record:
        """Record `at` of the general stream."""
        assert self.general is not None
        epoch, at = divmod(at, len(self.general))
        return self.general[int(shuffled(len(self.general), self.seed, GENERAL, epoch)[at])]


@lru_cache(maxsize=4)
def shuffled(size: int, seed: int, stream: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of `size` things in one epoch of a stream."""
    return np.random.default_rng([seed, stream, epoch]).permutation(size)


class EpochSampler(Sampler[int]):
    """The items of one epoch, in order; `epoch` is set before each."""

    def __init__(self, dataset: MixedDataset) -> None:
        self.items, self.epoch = len(dataset), 0

    def __len__(self) -> int:
        return self.items

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.items, (self.epoch + 1) * self.items))


def pack(
    sequences: Sequence[Int32s],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(input_ids, position_ids, predicts), each [T]: sequences one after the other in one row.

    position_ids start at 0 with each sequence; predicts is False at the last token of each. See
    pipeline.attention for what keeps the sequences apart.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    ends = np.cumsum(lengths)
    input_ids = np.concatenate(sequences).astype(np.int64)
    position_ids = np.arange(len(input_ids)) - np.repeat(ends - lengths, lengths)
    predicts = np.ones(len(input_ids), bool)
    predicts[ends - 1] = False
    return input_ids, position_ids, predicts


def collate(items: list[Item]) -> dict[str, Any]:
    """A micro-batch of these items, see `batch_of`."""
    records = [record for item in items for record in item.general]
    return batch_of([item.domain for item in items], records)


def batch_of(domain: list[Int32s], records: list[Record]) -> dict[str, Any]:
    """Sequences -> one packed row and its targets; domain sequences first.

    input_ids, position_ids  int64 [1, T], see `pack`; sequence_lengths, a list
    targets:
        rows          int64 [C + N]  positions of the row with a loss, domain first
        labels        int64 [C]      the tokens that the first C should predict
        ids, logprobs       [N, K]   the stored distributions of the others: int32, float32;
        tail_logprob        [N]      logprob -inf is padding
    """
    sequences = [*domain, *(record.input_ids for record in records)]
    lengths = [len(sequence) for sequence in sequences]
    row, positions, predicts = pack(sequences)
    rows = np.flatnonzero(predicts)
    domain_rows = rows[: int(np.searchsorted(rows, sum(lengths[: len(domain)])))]
    k = max((int(record.topk.counts.max(initial=0)) for record in records), default=0)
    dense = [record.topk.dense(k) for record in records]
    no_entries = np.zeros((0, k))
    targets = {
        "rows": rows,
        "labels": row[domain_rows + 1],
        "ids": np.concatenate([no_entries.astype(np.int32), *(ids for ids, _ in dense)]),
        "logprobs": np.concatenate(
            [no_entries.astype(np.float32), *(logprobs for _, logprobs in dense)]
        ),
        "tail_logprob": np.concatenate(
            [np.zeros(0, np.float32), *(record.topk.tail_logprob for record in records)]
        ),
    }
    return {
        "input_ids": torch.from_numpy(row)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "sequence_lengths": lengths,
        "targets": {name: torch.from_numpy(value) for name, value in targets.items()},
    }
