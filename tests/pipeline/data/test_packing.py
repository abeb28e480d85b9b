"""Sequences packed into rows, with the targets at their positions."""

from pathlib import Path

import numpy as np

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus, TokenSequences
from pipeline.data.mixing import GeneralStream, MixedDataset
from pipeline.data.packing import collate, fill
from pipeline.models.directory import ModelFolder
from storage import LogitDataset
from tests.helpers.corpora import some_texts, write_texts


def test_rows_hold_the_budget_and_every_sequence_once() -> None:
    lengths = [5, 90, 30, 30, 41, 100, 2, 250]
    bins = fill(lengths, 100)
    assert sorted(index for chosen in bins for index in chosen) == list(range(len(lengths)))
    assert [index for index in bins if sum(lengths[at] for at in index) > 100] == [[7]]
    assert len(bins) <= 5
    assert fill(lengths, None) == [list(range(8))]


def test_targets_stand_at_the_positions_that_predict_them(
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
