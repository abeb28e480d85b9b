"""What the tables of version 3 learn, and what they expect of other text."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import TopK
from storage.codec.root_grid import quantise
from storage.codec.v3_learning import FOLDS, folds, learn, quantiles
from tests.helpers.records import VOCAB, random_topk
from tests.storage.codec.test_v3 import STEP, alike, learnt


@pytest.mark.parametrize("rows", [0, 1, 2 * FOLDS - 1, 2 * FOLDS, 101])
def test_each_row_is_counted_once(rows: int) -> None:
    counted = [row for begin, end in folds(rows) for row in range(begin, end)]
    assert counted == list(range(rows))
    assert len(folds(rows)) == (FOLDS if rows >= 2 * FOLDS else min(rows, 1))


@given(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=5))
def test_quantiles_leave_their_share_below(parts: list[list[int]]) -> None:
    """Of all numbers, at most that share is below, and more than it is below or equal."""
    shares = (0.25, 0.5, 0.9)
    found = quantiles((np.array(part, np.uint16) for part in parts), shares)
    every = np.array(list(itertools.chain(*parts)))
    if not len(every):
        assert found.tolist() == [0, 0, 0]
        return
    for share, quantile in zip(shares, found, strict=True):
        assert (every < quantile).mean() <= share < (every <= quantile).mean()


def test_tables_say_what_they_were_learnt_from_and_what_they_expect() -> None:
    """On their own text, their cost is the size of the payloads, less heads and initial states."""
    topks = [alike(200, 30, seed=seed) for seed in range(3)]
    tables, inputs, grids = learnt(topks)
    assert tables.learnt == 600
    rows = [tables.row(input_ids) for input_ids in inputs]
    words = sum(len(row.write(grid)) for row, grid in zip(rows, grids, strict=True))
    entries = sum(len(grid.ids) for grid in grids)
    assert tables.cost == pytest.approx(16 * (words - 8 * 3) / entries, rel=0.01)
    assert tables.nbytes > len(tables.pack())


def test_unlike_text_costs_more_than_expected() -> None:
    tables, _, _ = learnt([alike(300, 30)])
    grid = quantise(random_topk(300, 30), VOCAB, STEP)
    words = tables.row(np.zeros(301, np.int32)).write(grid)
    assert 16 * len(words) / len(grid.ids) > 1.2 * tables.cost


def test_what_tables_expect_holds_for_other_text_of_their_kind() -> None:
    """Counted on the rows that the lists are from, they would expect less than they need."""
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 40, 301).astype(np.int32) for _ in range(24)]
    places = np.arange(5000) / 400
    logits = [rng.normal(0, 3, 5000) + np.cos(places * t) for t in range(40)]

    def text(input_ids: np.ndarray) -> TopK:
        full = np.array([logits[token] for token in input_ids[:-1]])
        full += rng.normal(0, 1, full.shape)
        full -= np.log(np.exp(full).sum(axis=1, keepdims=True))
        ids = np.argsort(-full, axis=1)[:, :40]
        best = np.take_along_axis(full, ids, 1)
        return TopK.from_dense(ids, best, np.log(1 - np.exp(best).sum(axis=1)))

    rows = [(ids, quantise(text(ids), 5000, STEP)) for ids in inputs]
    tables = learn(rows[:12], 5000)
    words = sum(len(tables.row(ids).write(grid)) for ids, grid in rows[12:])
    entries = sum(len(grid.ids) for _, grid in rows[12:])
    assert 16 * words / entries == pytest.approx(tables.cost, rel=0.04)
