"""The stream of training items: domain sequences mixed with rows of dumps."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.data.mixing import (
    BLOCK,
    GENERAL,
    EpochSampler,
    GeneralStream,
    Item,
    MixedDataset,
    apportion,
    smallest_weight,
)
from pipeline.data.orders import SHORT, permutation
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.token_sequences import Tokens, TokenSequences
from storage import LogitDataset
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.linked import Meeting
from tests.helpers.masks import MaskedDataset, sequences_of, some_targets


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> TokenSequences:
    corpus = write_texts(tmp_path_factory.mktemp("domain") / "d.jsonl", some_texts(11))
    return TokenSequences(Corpus(CorpusConfig(str(corpus)), ModelFolder(model_path).tokenizer, 100))


def stream(*dumps: LogitDataset, weights: tuple[float, ...] = (1,), seed: int = 1) -> GeneralStream:
    return GeneralStream(dumps, weights, seed)


def same_items(a: Item, b: Item) -> bool:
    return np.array_equal(a.domain.input_ids, b.domain.input_ids) and [
        (record.doc_id, record.chunk) for record in a.general
    ] == [(record.doc_id, record.chunk) for record in b.general]


def test_an_item_depends_only_on_its_position(domain: TokenSequences, dump_path: Path) -> None:
    general = LogitDataset(dump_path)
    forwards = MixedDataset(domain, stream(general), 1.0, seed=1, items_per_step=4)
    backwards = MixedDataset(domain, stream(LogitDataset(dump_path)), 1.0, seed=1, items_per_step=4)
    expected = [forwards[at] for at in range(60)]
    for at in reversed(range(60)):
        assert same_items(backwards[at], expected[at])
    other = MixedDataset(domain, stream(general, seed=2), 1.0, seed=2, items_per_step=4)
    assert not all(same_items(other[at], expected[at]) for at in range(20))


def test_rows_of_a_batch_are_requested_together(
    domain: TokenSequences, dump_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a remote dump, as a loader asks: the same items as one by one."""
    local = MixedDataset(domain, stream(LogitDataset(dump_path)), 2.0, 1, items_per_step=4)
    expected = [local[at] for at in (5, 2, 9)]
    far = LogitDataset(f"meeting://{dump_path}")
    for row in range(len(far)):
        far[row]  # the tables of each shard
    data = MixedDataset(domain, stream(far), 2.0, 1, items_per_step=4)
    monkeypatch.setattr(Meeting, "barrier", threading.Barrier(6))
    assert all(map(same_items, data.__getitems__([5, 2, 9]), expected))


def test_rows_of_several_dumps_keep_their_order(domain: TokenSequences, dump_path: Path) -> None:
    dumps = [LogitDataset(dump_path) for _ in range(2)]
    general = stream(*dumps, weights=(1, 2))
    rows = [5, 3, 8, 3, 1]
    places = [general._place(row) for row in rows]
    assert {which for which, _ in places} == {0, 1}
    found = [(record.doc_id, record.chunk) for record in general.records(rows)]
    one_by_one = [dumps[which][index] for which, index in places]
    assert found == [(record.doc_id, record.chunk) for record in one_by_one]


def test_an_epoch_sees_each_domain_sequence(domain: TokenSequences, dump_path: Path) -> None:
    data = MixedDataset(domain, stream(LogitDataset(dump_path)), 1.0, seed=1, items_per_step=4)
    assert len(data) == -(-len(domain) // 4) * 4
    orders = []
    for epoch in range(2):
        sampler = EpochSampler(data)
        sampler.epoch = epoch
        items = [data[at].domain.input_ids.tobytes() for at in sampler]
        assert set(items) == {sequence.input_ids.tobytes() for sequence in domain}
        orders.append(items)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0, 2.5])
def test_mix_sets_the_share_of_general_sequences(
    domain: TokenSequences, dump_path: Path, mix: float
) -> None:
    general = LogitDataset(dump_path)
    data = MixedDataset(domain, stream(general), mix, seed=1, items_per_step=4)
    items = 200
    seen = [(r.doc_id, r.chunk) for at in range(items) for r in data[at].general]
    assert len(seen) == int(items * mix)
    # No row comes again before every row has come once.
    assert len(set(seen)) == min(len(general), len(seen))


def test_each_pass_of_the_general_stream_sees_every_row(dump_path: Path) -> None:
    general = LogitDataset(dump_path)
    endless = stream(general)
    for epoch in range(3):
        rows = range(epoch * len(general), (epoch + 1) * len(general))
        names = {(r.doc_id, r.chunk) for r in endless.records(rows)}
        assert len(names) == len(general)
    assert endless.epochs(2 * len(general)) == [2.0]


def test_weights_set_the_shares_of_several_dumps(dump_path: Path) -> None:
    one, other = LogitDataset(dump_path), LogitDataset(dump_path)
    endless = stream(one, other, weights=(3, 1))
    places = [endless._place(at) for at in range(3 * BLOCK)]
    for number, share in ((0, 750), (1, 250)):
        mine = [which == number for which, _ in places]
        assert [sum(mine[block * BLOCK :][:BLOCK]) for block in range(3)] == [share] * 3
        # Each dump has epochs of its own, independent of the other dump.
        epochs = [permutation(len(one), 1, GENERAL + 2 * number, epoch) for epoch in range(99)]
        expected = np.concatenate(epochs)[: 3 * share]
        assert [index for which, index in places if which == number] == expected.tolist()
    assert endless.epochs(4 * BLOCK) == [3 * BLOCK / len(one), BLOCK / len(one)]


def test_mix_by_tokens_keeps_the_ratio_of_targets(domain: TokenSequences, dump_path: Path) -> None:
    """Of both sides, over whole epochs; sequences without a mask count with all their tokens."""
    half = [
        Tokens(one.input_ids, some_targets(len(one)) if at % 2 else None)
        for at, one in enumerate(domain)
    ]
    for text, general in (
        (domain, LogitDataset(dump_path)),
        (sequences_of(half), MaskedDataset(dump_path)),
    ):
        mix, per_step = 1.5, 1
        data = MixedDataset(text, stream(general), mix, 1, per_step, mix_by="tokens")
        epochs = 7 * len(general)  # until both end together, but for one row
        items = epochs * len(text)
        passes = data.epochs(items)["general_epochs"]
        expected = mix * epochs * text.target_counts.sum() / general.target_counts.sum()
        assert 0 <= expected - passes < 1.01 / len(general)
        counts = np.diff([data.general_rows(at) for at in range(300)])
        assert counts.max() - counts.min() <= 1  # evenly, wherever the run starts
        assert [len(data[at].general) for at in (items, 3)] == [
            data.general_rows(at + 1) - data.general_rows(at) for at in (items, 3)
        ]


class Sized:
    """A corpus of so many sequences, as far as the orders ask."""

    def __init__(self, size: int) -> None:
        self.size, self.asked = size, list[int]()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tokens:
        self.asked.append(index)
        return Tokens(np.zeros(2, np.int32))


@pytest.mark.parametrize("size", [70_000, 50_000_000, 10**12])
def test_a_large_corpus_costs_what_it_gives(size: int, dump_path: Path) -> None:
    """An item asks for its own sequence, whatever the number of sequences, and again the same."""
    text = Sized(size)
    data = MixedDataset(text, stream(LogitDataset(dump_path)), 1.0, 1, 4)  # type: ignore[arg-type]
    items = [0, 5, size - 1, 3 * size + 7]
    data.__getitems__(items)
    assert len(set(text.asked)) == len(items)
    first, text.asked = text.asked, []
    again = MixedDataset(text, stream(LogitDataset(dump_path)), 1.0, 1, 4)  # type: ignore[arg-type]
    again.__getitems__(items[::-1])
    assert text.asked == first[::-1]


def test_orders_are_new_where_they_changed(domain: TokenSequences, dump_path: Path) -> None:
    general = stream(LogitDataset(dump_path))
    assert not MixedDataset(domain, general, 1.0, 1, 4).orders_are_new
    assert MixedDataset(domain, general, 1.0, 1, 4, "tokens").orders_are_new
    long = Sized(SHORT + 1)
    assert MixedDataset(long, general, 1.0, 1, 4).orders_are_new  # type: ignore[arg-type]


def test_masks_do_not_change_the_order(domain: TokenSequences, dump_path: Path) -> None:
    masked = sequences_of([Tokens(one.input_ids, some_targets(len(one))) for one in domain])
    one = MixedDataset(domain, stream(LogitDataset(dump_path)), 1.0, 1, 4)
    other = MixedDataset(masked, stream(MaskedDataset(dump_path)), 1.0, 1, 4)
    assert all(same_items(one[at], other[at]) for at in range(40))


@given(st.lists(st.none() | st.lists(st.booleans(), min_size=1), max_size=6))
def test_token_sequences_keep_their_masks(masks: list[list[bool] | None]) -> None:
    given = [
        Tokens(np.arange(len(mask or "four"), dtype=np.int32), mask and np.array(mask))
        for mask in masks
    ]
    found = sequences_of(given)
    every = all(mask is None for mask in masks)
    for text in (found, found.spread(3)):
        chosen = [given[at] for at in text.documents]
        assert len(text) == len(chosen)
        for one, other in zip(text, chosen, strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.positions.tolist() == other.positions.tolist()
        counts = [len(one) if every else len(one.positions) for one in chosen]
        assert text.target_counts.tolist() == counts


def test_apportion_rounds_shares_to_the_whole() -> None:
    assert apportion([1, 1, 1], 1000) == [334, 333, 333]
    assert apportion([0.2, 0.8], 10) == [2, 8]


def test_a_dump_that_would_never_be_read_is_refused(dump_path: Path) -> None:
    dumps = [LogitDataset(dump_path), LogitDataset(dump_path)]
    assert apportion([2000, 1], BLOCK) == [1000, 0]
    with pytest.raises(
        ConfigError, match=r"weight 1 of 2001 .* a weight of ([\d.]+) or more"
    ) as told:
        GeneralStream(dumps, [2000, 1], 0)
    smallest = float(str(told.value).split("weight of ")[1].split()[0])
    assert GeneralStream(dumps, [2000, smallest], 0).shares[1] == 1
    with pytest.raises(ConfigError):
        GeneralStream(dumps, [2000, smallest * 0.99], 0)


@given(st.lists(st.floats(1e-3, 1e6), min_size=2, max_size=5), st.data())
def test_the_smallest_weight_gets_a_share(weights: list[float], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(weights) - 1))
    weights[index] = sum(weights) / 1e6
    if apportion(weights, BLOCK)[index] == 0:
        weights[index] = smallest_weight(weights, index, BLOCK)
    assert apportion(weights, BLOCK)[index] >= 1
