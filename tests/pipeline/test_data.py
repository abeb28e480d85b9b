"""The stream of training items and their packed batches."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.data import EpochSampler, Item, MixedDataset, TokenSequences, collate
from pipeline.model_dir import load_tokenizer
from storage import LogitDataset
from tests.pipeline.corpora import some_texts, write_texts


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> TokenSequences:
    corpus = write_texts(tmp_path_factory.mktemp("domain") / "d.jsonl", some_texts(11))
    return TokenSequences(Corpus(CorpusConfig(str(corpus)), load_tokenizer(model_path), 100))


def same_items(a: Item, b: Item) -> bool:
    return np.array_equal(a.domain, b.domain) and [
        (record.doc_id, record.chunk) for record in a.general
    ] == [(record.doc_id, record.chunk) for record in b.general]


def test_item_is_a_function_of_its_position(domain: TokenSequences, dump_path: Path) -> None:
    general = LogitDataset(dump_path)
    forwards = MixedDataset(domain, general, 1.0, seed=1, items_per_step=4)
    backwards = MixedDataset(domain, LogitDataset(dump_path), 1.0, seed=1, items_per_step=4)
    expected = [forwards[at] for at in range(60)]
    for at in reversed(range(60)):
        assert same_items(backwards[at], expected[at])
    other = MixedDataset(domain, general, 1.0, seed=2, items_per_step=4)
    assert not all(same_items(other[at], expected[at]) for at in range(20))


def test_an_epoch_sees_each_domain_sequence(domain: TokenSequences, dump_path: Path) -> None:
    data = MixedDataset(domain, LogitDataset(dump_path), 1.0, seed=1, items_per_step=4)
    assert len(data) == -(-len(domain) // 4) * 4
    orders = []
    for epoch in range(2):
        sampler = EpochSampler(data)
        sampler.epoch = epoch
        items = [data[at].domain.tobytes() for at in sampler]
        assert set(items) == {sequence.tobytes() for sequence in domain}
        orders.append(items)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0, 2.5])
def test_general_sequences_come_in_their_share_and_none_is_left_out(
    domain: TokenSequences, dump_path: Path, mix: float
) -> None:
    general = LogitDataset(dump_path)
    data = MixedDataset(domain, general, mix, seed=1, items_per_step=4)
    items = -(-len(general) // mix).__int__() if mix else 40
    seen = [(r.doc_id, r.chunk) for at in range(items) for r in data[at].general]
    assert len(seen) == int(items * mix)
    once = seen[: len(general)]
    assert len(set(once)) == len(once)  # a pass is over before any row comes again


def test_targets_stand_at_the_positions_that_predict_them(
    domain: TokenSequences, dump_path: Path
) -> None:
    data = MixedDataset(domain, LogitDataset(dump_path), 2.0, seed=1, items_per_step=4)
    items = [data[at] for at in range(3)]
    batch = collate(items)
    targets = batch["targets"]
    row, at = batch["input_ids"][0].numpy(), 0
    expected_rows, labels = [], []
    for item in items:
        expected_rows += range(at, at + len(item.domain) - 1)
        labels += item.domain[1:].tolist()
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
