"""Sequences packed into rows, with the targets at their positions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.data.mixing import GeneralStream, MixedDataset
from pipeline.data.packing import (
    PackedRow,
    collate,
    domain_part,
    fill,
    general_part,
    pack_row,
    without_targets,
)
from pipeline.models.directory import ModelFolder
from pipeline.token_sequences import Tokens, TokenSequences
from storage import LogitDataset, Record
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.masks import masked
from tests.helpers.models import tiny_model
from tests.helpers.records import random_topk
from tests.helpers.rows import losses, mixed_row


@pytest.fixture(params=[False, True], ids=["all tokens", "masks"])
def row(dump_path: Path, request: pytest.FixtureRequest) -> PackedRow:
    return mixed_row(dump_path, request.param)


def test_fill_keeps_to_the_size_and_takes_every_sequence_once() -> None:
    lengths = [5, 90, 30, 30, 41, 100, 2, 250]
    bins = fill(lengths, 100)
    assert sorted(index for chosen in bins for index in chosen) == list(range(len(lengths)))
    assert [index for index in bins if sum(lengths[at] for at in index) > 100] == [[7]]
    assert len(bins) <= 5
    assert fill(lengths, None) == [list(range(8))]


def test_targets_are_at_the_positions_that_predict_them(
    tmp_path: Path, model_path: Path, dump_path: Path
) -> None:
    corpus = CorpusConfig(str(write_texts(tmp_path / "domain.jsonl", some_texts(11))))
    domain = TokenSequences(Corpus(corpus, ModelFolder(model_path).tokenizer, 100))
    general = GeneralStream([LogitDataset(dump_path)], (1,), 1)
    data = MixedDataset(domain, general, 2.0, seed=1, items_per_step=4)
    items = [data[at] for at in range(3)]
    (batch,) = collate(items)["packed"]
    targets = batch["targets"]
    row, at = batch["input_ids"][0].numpy(), 0
    expected_rows, labels = [], []
    for item in items:
        expected_rows += range(at, at + len(item.domain) - 1)
        labels += item.domain.input_ids[1:].tolist()
        at += len(item.domain)
    first_general = at
    for record in (record for item in items for record in item.general):
        np.testing.assert_array_equal(row[at : at + len(record.input_ids)], record.input_ids)
        expected_rows += range(at, at + len(record.topk))
        at += len(record.input_ids)
    assert at == len(row) > first_general
    assert targets["rows"].tolist() == expected_rows
    assert targets["labels"].tolist() == labels
    records = [record for item in items for record in item.general]
    np.testing.assert_array_equal(
        targets["tail_logprob"], np.concatenate([r.topk.tail_logprob for r in records])
    )
    np.testing.assert_array_equal(
        targets["ids"], np.concatenate([r.topk.dense(8)[0] for r in records])
    )


def assert_same_row(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["sequence_lengths"] == expected["sequence_lengths"]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(found[name], expected[name])
    for name, value in expected["targets"].items():
        other = found["targets"][name]
        assert other.numel() == value.numel() == 0 or torch.equal(other, value)


def test_each_part_of_a_row_equals_a_row_of_that_kind(dump_path: Path) -> None:
    records = list(LogitDataset(dump_path))[:3]
    domain = [Tokens(np.arange(1, 6, dtype=np.int32)), Tokens(np.arange(9, 20, dtype=np.int32))]
    both = pack_row(domain, records)
    assert_same_row(domain_part(both), pack_row(domain, []))
    assert_same_row(general_part(both), pack_row([], records))
    # If one kind is missing, a sequence without targets takes its place.
    assert_same_row(domain_part(pack_row([], records)), without_targets(pack_row([], records)))
    assert_same_row(general_part(pack_row(domain, [])), without_targets(pack_row(domain, [])))
    assert without_targets(both)["sequence_lengths"] == [5]


def masks(tokens: int) -> st.SearchStrategy[np.ndarray]:
    """Any mask; that of the first token has no meaning."""
    return st.lists(st.booleans(), min_size=tokens, max_size=tokens).map(np.array)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[Tokens], list[Record]]:
    """Domain and general sequences with masks, some without any target."""
    domain, general = [], []
    for number in range(draw(st.integers(1, 3))):
        ids = np.arange(number * 100, number * 100 + draw(st.integers(2, 9)), dtype=np.int32)
        domain.append(Tokens(ids, draw(st.none() | masks(len(ids)))))
    for number in range(draw(st.integers(0, 3))):
        ids = np.arange(number, number + draw(st.integers(2, 9)), dtype=np.int32)
        record = Record(str(number), 0, ids, random_topk(len(ids) - 1, 3, seed=number))
        targets = draw(st.none() | masks(len(ids)))
        general.append(record if targets is None else masked(record, targets))
    return domain, general


@settings(max_examples=50)
@given(sequences())
def test_a_row_learns_its_targets_alone(given: tuple[list[Tokens], list[Record]]) -> None:
    domain, general = given
    row = pack_row(domain, general)
    rows, labels, tails, at = [], [], [], 0
    for one in [*domain, *general]:
        entry = 0
        for t in range(len(one.input_ids) - 1):
            if one.targets is None or one.targets[t + 1]:
                rows.append(at + t)
                if isinstance(one, Tokens):
                    labels.append(one.input_ids[t + 1])
                else:
                    tails.append(one.topk.tail_logprob[entry])
                    entry += 1
        at += len(one.input_ids)
    targets = row["targets"]
    assert targets["rows"].tolist() == rows
    assert targets["labels"].tolist() == labels
    np.testing.assert_array_equal(targets["tail_logprob"], np.array(tails, np.float32))
    assert_same_row(domain_part(row), pack_row(domain, []))
    if general:
        assert_same_row(general_part(row), pack_row([], general))
    else:
        assert_same_row(general_part(row), without_targets(row))


def test_losses_of_both_parts_are_those_of_the_row(tmp_path: Path, row: PackedRow) -> None:
    student = tiny_model(tmp_path / "student", seed=3)
    domain, expected = losses(student, row)
    _, first = losses(student, domain_part(row))
    _, second = losses(student, general_part(row))
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-4, atol=1e-5)
    assert len(first) == domain


def test_the_general_part_keeps_its_losses(tmp_path: Path, row: PackedRow) -> None:
    student = tiny_model(tmp_path / "student", seed=3)
    found = general_part(row)
    assert found["sequence_lengths"] == row["sequence_lengths"][2:]
    assert found["position_ids"][0, 0] == 0
    domain, expected = losses(student, row)
    scored, general = losses(student, found)
    assert scored == 0
    torch.testing.assert_close(general, expected[domain:], rtol=1e-4, atol=1e-5)


def test_a_missing_part_has_no_targets(dump_path: Path) -> None:
    row = pack_row([Tokens(LogitDataset(dump_path)[5].input_ids[:30])], [])
    assert len(general_part(row)["targets"]["rows"]) == 0
