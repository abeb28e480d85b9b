"""Packed rows: sequences one after the other in one row, with the targets of stage two."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.mixing import Item
from pipeline.types import Int32s, Int64s
from storage import Record


class Targets(TypedDict):
    """What the C domain positions and N general positions of a packed row learn."""

    rows: Tensor
    """int64 [C + N]: positions in the row, domain first."""
    labels: Tensor
    """int64 [C]: the next token of each domain position."""
    ids: Tensor
    """int32 [N, K]: stored ids, and sampled ones where a dump has them."""
    logprobs: Tensor
    """float32 [N, K], nats; -inf is padding."""
    tail_logprob: Tensor
    """float32 [N], nats; -inf where samples stand for the tail."""
    row_weights: NotRequired[Tensor]
    """float32 [C + N]: weight of each position in the loss; set just before the forward."""


class PackedRow(TypedDict):
    """One row for the model. A plain dict, which a Trainer moves to its device."""

    input_ids: Tensor
    """int64 [1, T]."""
    position_ids: Tensor
    """int64 [1, T]: from 0 in each sequence."""
    sequence_lengths: list[int]
    """Tokens of each sequence; they sum to T."""
    targets: Targets


class Packed(NamedTuple):
    """Sequences one after the other, each array [T]."""

    input_ids: Int64s
    position_ids: Int64s
    predicts: npt.NDArray[np.bool_]
    """False at the last token of each sequence."""


def pack(sequences: Sequence[Int32s]) -> Packed:
    """Join sequences into one row. `pipeline.models.attention` keeps them apart in the model."""
    lengths = np.array([len(sequence) for sequence in sequences])
    ends = np.cumsum(lengths)
    input_ids = np.concatenate(sequences).astype(np.int64)
    position_ids = np.arange(len(input_ids)) - np.repeat(ends - lengths, lengths)
    predicts = np.ones(len(input_ids), bool)
    predicts[ends - 1] = False
    return Packed(input_ids, position_ids, predicts)


def collate(
    items: list[Item], row_tokens: int | None = None, vocab_size: int | None = None
) -> dict[str, list[PackedRow]]:
    """{"packed": the items' sequences as `packed_rows`}."""
    general = [record for item in items for record in item.general]
    return {"packed": packed_rows([item.domain for item in items], general, row_tokens, vocab_size)}


def packed_rows(
    domain: list[Int32s],
    general: list[Record],
    row_tokens: int | None = None,
    vocab_size: int | None = None,
) -> list[PackedRow]:
    """Pack sequences into rows of at most `row_tokens` tokens; into one row without a limit.

    A longer sequence gets a row of its own. `vocab_size` is the width of the student's head, see
    `pack_row`.
    """
    lengths = [len(ids) for ids in domain] + [len(record.input_ids) for record in general]
    return [
        pack_row(
            [domain[index] for index in chosen if index < len(domain)],
            [general[index - len(domain)] for index in chosen if index >= len(domain)],
            vocab_size,
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


def pack_row(
    domain: list[Int32s], records: list[Record], vocab_size: int | None = None
) -> PackedRow:
    """Pack domain sequences, then general ones, into one row with its targets.

    Sampled ids are among the entries of a record that has some; it then has no tail. Stored ids
    from `vocab_size` on, which the student's head lacks, go to the tail.
    """
    sequences = [*domain, *(record.input_ids for record in records)]
    lengths = [len(sequence) for sequence in sequences]
    input_ids, position_ids, predicts = pack(sequences)
    rows = np.flatnonzero(predicts)
    domain_rows = rows[: int(np.searchsorted(rows, sum(lengths[: len(domain)])))]
    topks = [record.topk.spread_tail() for record in records]
    if vocab_size is not None:
        topks = [topk.fold(vocab_size) for topk in topks]
    k = max((int(topk.counts.max(initial=0)) for topk in topks), default=0)
    dense = [topk.dense(k) for topk in topks]
    no_entries = np.zeros((0, k))
    ids = [no_entries.astype(np.int32), *(ids for ids, _ in dense)]
    logprobs = [no_entries.astype(np.float32), *(logprobs for _, logprobs in dense)]
    tails = [np.zeros(0, np.float32), *(topk.tail_logprob for topk in topks)]
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "sequence_lengths": lengths,
        "targets": {
            "rows": torch.from_numpy(rows),
            "labels": torch.from_numpy(input_ids[domain_rows + 1]),
            "ids": torch.from_numpy(np.concatenate(ids)),
            "logprobs": torch.from_numpy(np.concatenate(logprobs)),
            "tail_logprob": torch.from_numpy(np.concatenate(tails)),
        },
    }


def with_targets(row: PackedRow, **changes: Tensor) -> PackedRow:
    """The row with some of its targets replaced."""
    targets: Mapping[str, Tensor] = {**row["targets"], **changes}  # type: ignore[dict-item]
    return {**row, "targets": targets}  # type: ignore[typeddict-item]


def domain_part(row: PackedRow) -> PackedRow:
    """The row without its general sequences."""
    targets = row["targets"]
    labels, tokens = len(targets["labels"]), domain_tokens(row)
    if not labels:
        return without_targets(row)
    no_general = {name: targets[name][:0] for name in GENERAL}  # type: ignore[literal-required]
    kept = with_targets(row, **no_general, rows=targets["rows"][:labels])
    return cut(kept, slice(0, tokens))


def general_part(row: PackedRow) -> PackedRow:
    """The row without its domain sequences."""
    targets = row["targets"]
    labels, tokens = len(targets["labels"]), domain_tokens(row)
    if tokens == row["input_ids"].shape[1]:
        return without_targets(row)
    rows = targets["rows"][labels:] - tokens
    return cut(with_targets(row, rows=rows, labels=targets["labels"][:0]), slice(tokens, None))


def without_targets(row: PackedRow) -> PackedRow:
    """The row's first sequence, with nothing to learn from it."""
    nothing = {name: value[:0] for name, value in row["targets"].items()}  # type: ignore[index]
    return cut(with_targets(row, **nothing), slice(0, row["sequence_lengths"][0]))


def domain_tokens(row: PackedRow) -> int:
    """Tokens of the row's domain sequences, which come first."""
    labels = len(row["targets"]["labels"])
    return int(row["targets"]["rows"][labels - 1]) + 2 if labels else 0


def cut(row: PackedRow, tokens: slice) -> PackedRow:
    """These tokens of the row, whole sequences of it; its targets are the caller's business."""
    return {
        "input_ids": row["input_ids"][:, tokens],
        "position_ids": row["position_ids"][:, tokens],
        "sequence_lengths": list(lengths_within(row["sequence_lengths"], tokens)),
        "targets": row["targets"],
    }


def lengths_within(lengths: list[int], tokens: slice) -> Iterator[int]:
    start = 0
    for length in lengths:
        if start >= (tokens.start or 0) and (tokens.stop is None or start < tokens.stop):
            yield length
        start += length


GENERAL = ("ids", "logprobs", "tail_logprob")
"""The targets that only general positions have."""
