"""Items of the stream -> packed rows with their targets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.mixing import Item
from pipeline.types import Int32s
from storage import Record


def pack(
    sequences: Sequence[Int32s],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(input_ids, position_ids, predicts), each [T]: sequences one after the other in one row.

    position_ids start at 0 with each sequence; predicts is False at the last token of each. See
    pipeline.models.attention for what keeps the sequences apart.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    ends = np.cumsum(lengths)
    input_ids = np.concatenate(sequences).astype(np.int64)
    position_ids = np.arange(len(input_ids)) - np.repeat(ends - lengths, lengths)
    predicts = np.ones(len(input_ids), bool)
    predicts[ends - 1] = False
    return input_ids, position_ids, predicts


def collate(items: list[Item], row_tokens: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """{"packed": [...]}: the items' sequences as `packed_rows`."""
    general = [record for item in items for record in item.general]
    return {"packed": packed_rows([item.domain for item in items], general, row_tokens)}


def packed_rows(
    domain: list[Int32s], general: list[Record], row_tokens: int | None = None
) -> list[dict[str, Any]]:
    """Sequences in rows of at most row_tokens tokens, each a `batch_of`; in one without a limit.

    A sequence that is longer by itself has a row of its own.
    """
    lengths = [len(ids) for ids in domain] + [len(record.input_ids) for record in general]
    return [
        batch_of(
            [domain[index] for index in chosen if index < len(domain)],
            [general[index - len(domain)] for index in chosen if index >= len(domain)],
        )
        for chosen in fill(lengths, row_tokens)
    ]


def fill(lengths: list[int], size: int | None) -> list[list[int]]:
    """Indices of what goes into each bin of `size`: first fit, longest first, sorted in a bin."""
    if size is None:
        return [list(range(len(lengths)))]
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = (at for at, left in enumerate(room) if left >= lengths[index])
        at = next(fits, len(bins))
        if at == len(bins):
            bins.append([])
            room.append(max(size, lengths[index]))
        bins[at].append(index)
        room[at] -= lengths[index]
    return [sorted(chosen) for chosen in bins]


def batch_of(domain: list[Int32s], records: list[Record]) -> dict[str, Any]:
    """Sequences -> one packed row and its targets; domain sequences first.

    input_ids, position_ids  int64 [1, T], see `pack`; sequence_lengths, a list
    targets:
        rows          int64 [C + N]  positions of the row with a loss, domain first
        labels        int64 [C]      the tokens that the first C should predict
        ids, logprobs       [N, K]   the stored distributions of the others: int32, float32;
        tail_logprob        [N]      logprob -inf is padding; sampled ids are among the entries, and
                                     then there is no tail
    """
    sequences = [*domain, *(record.input_ids for record in records)]
    lengths = [len(sequence) for sequence in sequences]
    row, positions, predicts = pack(sequences)
    rows = np.flatnonzero(predicts)
    domain_rows = rows[: int(np.searchsorted(rows, sum(lengths[: len(domain)])))]
    topks = [record.topk.spread_tail() for record in records]
    k = max((int(topk.counts.max(initial=0)) for topk in topks), default=0)
    dense = [topk.dense(k) for topk in topks]
    no_entries = np.zeros((0, k))
    targets = {
        "rows": rows,
        "labels": row[domain_rows + 1],
        "ids": np.concatenate([no_entries.astype(np.int32), *(ids for ids, _ in dense)]),
        "logprobs": np.concatenate(
            [no_entries.astype(np.float32), *(logprobs for _, logprobs in dense)]
        ),
        "tail_logprob": np.concatenate(
            [np.zeros(0, np.float32), *(topk.tail_logprob for topk in topks)]
        ),
    }
    return {
        "input_ids": torch.from_numpy(row)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "sequence_lengths": lengths,
        "targets": {name: torch.from_numpy(value) for name, value in targets.items()},
    }
