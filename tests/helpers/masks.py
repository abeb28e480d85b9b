"""Sequences and rows with masks, in memory."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.corpus import Corpus
from pipeline.token_sequences import Tokens, TokenSequences, read_tokens
from pipeline.token_store import Part, Row, TokenStore, as_arrow, batches, schema_of
from pipeline.training import inputs
from storage import LogitDataset, Record, Samples
from storage.targets import Bools, positions_of


def some_targets(tokens: int, share: float = 0.4, seed: int = 0) -> Bools:
    """bool [tokens]: each token but the first is a target with this probability, one at least."""
    rng = np.random.default_rng([tokens, seed])
    targets = rng.random(tokens) < share
    targets[rng.integers(1, tokens)] = True
    targets[0] = False
    return targets


def masked(record: Record, targets: Bools) -> Record:
    """The record of a dump that stores these targets alone, from one that stores all."""
    assert record.targets is None
    topk, kept = record.topk, np.zeros(len(record.topk), bool)
    kept[positions_of(targets, len(record.input_ids))] = True
    entries = np.repeat(kept, topk.counts)
    samples = topk.samples
    if samples is not None:
        drawn = np.repeat(kept, samples.counts)
        samples = Samples(
            samples.draws, samples.counts[kept], samples.ids[drawn], samples.times[drawn]
        )
    parts = topk.counts[kept], topk.ids[entries], topk.logprobs[entries], topk.tail_logprob[kept]
    return replace(record, topk=type(topk)(*parts, samples), targets=targets)


def sequences_of(tokens: list[Tokens]) -> TokenSequences:
    """A corpus in memory, each sequence a document of its own."""
    masked = any(one.targets is not None for one in tokens)
    rows = [Row.of(at, 0, one.input_ids, one.targets, masked) for at, one in enumerate(tokens)]
    schema = schema_of(1 << 31, masked)
    part = Part([as_arrow(batch, schema) for batch in batches(rows)])
    content = {"facts": {"documents": len(rows)}, "parts": [asdict(part.sums("memory", 0))]}
    store = TokenStore(Path(), content)
    store.open[0] = part
    return TokenSequences(SimpleNamespace(store=store))  # type: ignore[arg-type]


def read_masked(corpus: Corpus) -> TokenSequences:
    """`read_tokens`, with masks of `some_targets`."""
    return sequences_of(
        [Tokens(one.input_ids, some_targets(len(one))) for one in read_tokens(corpus)]
    )


def give_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every corpus and dump that a training run reads has masks of `some_targets`."""
    monkeypatch.setattr(inputs, "read_tokens", read_masked)
    monkeypatch.setattr(inputs, "LogitDataset", MaskedDataset)


class MaskedDataset(LogitDataset):
    """A dump whose rows store `some_targets` alone, from one that stores all."""

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        return masked(record, some_targets(len(record.input_ids)))

    def read(self, indices: Iterable[int]) -> list[Record]:
        return [self[index] for index in indices]

    @cached_property
    def target_counts(self) -> Any:
        return np.array([len(self[index].positions) for index in range(len(self))], np.int32)
