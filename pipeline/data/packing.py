"""Packed rows: sequences one after the other in one row, with the targets of stage two."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from pipeline.data.mixing import Item
from pipeline.token_sequences import Tokens
from pipeline.types import Int64s
from storage import Record


class Targets(TypedDict):
    """What a packed row learns: C domain targets and N general ones."""

    rows: Tensor
    """int64 [C + N]: the positions in the row that predict them, domain first."""
    labels: Tensor
    """int64 [C]: the domain targets, each the token after its position."""
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
    domain_tokens: int
    """Tokens of the domain sequences, which come first; targets or not."""
    targets: Targets


class Packed(NamedTuple):
    """Sequences one after the other."""

    input_ids: Int64s
    """[T]"""
    position_ids: Int64s
    """[T]: from 0 in each sequence."""
    rows: Int64s
    """[P]: the positions in the row that predict a target."""


def pack(sequences: Sequence[Tokens | Record]) -> Packed:
    """Join sequences into one row. `pipeline.models.attention` keeps them apart in the model."""
    lengths = np.array(lengths_of(sequences))
    starts = np.cumsum(lengths) - lengths
    input_ids = np.concatenate([sequence.input_ids for sequence in sequences]).astype(np.int64)
    position_ids = np.arange(len(input_ids)) - np.repeat(starts, lengths)
    rows = [start + one.positions for start, one in zip(starts, sequences, strict=True)]
    return Packed(input_ids, position_ids, np.concatenate(rows))


def lengths_of(sequences: Sequence[Tokens | Record]) -> list[int]:
    """Tokens of each sequence."""
    return [len(sequence.input_ids) for sequence in sequences]


def collate(
    items: list[Item], row_tokens: int | None = None, vocab_size: int | None = None
) -> dict[str, list[PackedRow]]:
    """{"packed": the items' sequences as `packed_rows`}."""
    general = [record for item in items for record in item.general]
    return {"packed": packed_rows([item.domain for item in items], general, row_tokens, vocab_size)}


def packed_rows(
    domain: Sequence[Tokens],
    general: Sequence[Record],
    row_tokens: int | None = None,
    vocab_size: int | None = None,
) -> list[PackedRow]:
    """Pack sequences into rows of at most `row_tokens` tokens; into one row without a limit.

    A longer sequence gets a row of its own. `vocab_size` is the width of the student's head, see
    `pack_row`.
    """
    lengths = lengths_of([*domain, *general])
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
    domain: Sequence[Tokens], records: Sequence[Record], vocab_size: int | None = None
) -> PackedRow:
    """Pack domain sequences, then general ones, into one row with its targets.

    Sampled ids are among the entries of a record that has some; it then has no tail. Stored ids
    from `vocab_size` on, which the student's head lacks, go to the tail.
    """
    sequences: list[Tokens | Record] = [*domain, *records]
    input_ids, position_ids, rows = pack(sequences)
    domain_tokens = sum(map(len, domain))
    domain_rows = rows[: int(np.searchsorted(rows, domain_tokens))]
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
        "sequence_lengths": lengths_of(sequences),
        "domain_tokens": domain_tokens,
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
    targets, tokens = row["targets"], row["domain_tokens"]
    if not tokens:
        return without_targets(row)
    labels = len(targets["labels"])
    no_general = {name: targets[name][:0] for name in GENERAL}  # type: ignore[literal-required]
    kept = with_targets(row, **no_general, rows=targets["rows"][:labels])
    return cut(kept, slice(0, tokens))


def general_part(row: PackedRow) -> PackedRow:
    """The row without its domain sequences."""
    targets, tokens = row["targets"], row["domain_tokens"]
    if tokens == row["input_ids"].shape[1]:
        return without_targets(row)
    rows = targets["rows"][len(targets["labels"]) :] - tokens
    return cut(with_targets(row, rows=rows, labels=targets["labels"][:0]), slice(tokens, None))


def without_targets(row: PackedRow) -> PackedRow:
    """The row's first sequence, with nothing to learn from it."""
    nothing = {name: value[:0] for name, value in row["targets"].items()}  # type: ignore[index]
    return cut(with_targets(row, **nothing), slice(0, row["sequence_lengths"][0]))


def cut(row: PackedRow, tokens: slice) -> PackedRow:
    """These tokens of the row, whole sequences of it; its targets are the caller's business."""
    domain = range(row["domain_tokens"])[tokens]
    return {
        "input_ids": row["input_ids"][:, tokens],
        "position_ids": row["position_ids"][:, tokens],
        "sequence_lengths": list(lengths_within(row["sequence_lengths"], tokens)),
        "domain_tokens": len(domain),
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
