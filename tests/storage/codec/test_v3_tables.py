"""The tables of version 3: what they learn, and what is refused of their bytes."""

import struct
import zlib

import numpy as np
import pytest

from storage import CorruptPayload, FormatVersionError, TopK
from storage.codec.codec import pack, unpack
from storage.codec.root_grid import quantise
from storage.codec.v3_tables import HEAD, Tables
from tests.helpers.records import VOCAB, random_topk
from tests.storage.codec.test_v3 import STEP, alike, flipped, learnt


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
    tables = Tables.learn(rows[:12], 5000)
    words = sum(len(tables.row(ids).write(grid)) for ids, grid in rows[12:])
    entries = sum(len(grid.ids) for _, grid in rows[12:])
    assert 16 * words / entries == pytest.approx(tables.cost, rel=0.04)


def test_tables_pack_and_unpack_the_same_everywhere() -> None:
    tables, (input_ids,), (grid,) = learnt([alike(60, 16)])
    data = tables.pack()
    found = Tables.unpack(data, VOCAB)
    assert found.checksum == tables.checksum
    assert found.pack() == data == learnt([alike(60, 16)])[0].pack()
    assert (found.learnt, found.cost) == (tables.learnt, tables.cost)
    assert pack(grid, found.row(input_ids)) == pack(grid, tables.row(input_ids))
    with pytest.raises(CorruptPayload, match="a vocabulary of 300 ids, the plan says 301"):
        Tables.unpack(data, VOCAB + 1)


def test_tables_of_nothing_are_tables() -> None:
    tables = Tables.unpack(Tables.learn([], VOCAB).pack(), VOCAB)
    grid = quantise(alike(20, 16), VOCAB, STEP)
    row = tables.row(np.zeros(21, np.int32))
    assert unpack(pack(grid, row), row).same(grid)


def test_every_flipped_byte_is_detected() -> None:
    data = learnt([alike(30, 16)])[0].pack()
    for at in range(len(data)):
        with pytest.raises((CorruptPayload, FormatVersionError)):
            Tables.unpack(flipped(data, at))
    for size in (0, 3, HEAD.size, len(data) - 1):
        with pytest.raises(CorruptPayload):
            Tables.unpack(data[:size])


def test_a_later_version_is_named() -> None:
    data = learnt([alike(30, 16)])[0].pack()
    with pytest.raises(FormatVersionError, match=r"tables of version 2, .* update mol-distill"):
        Tables.unpack(data[:4] + struct.pack("<I", 2) + data[8:])


FIELDS = {"vocab": 2, "frequent": 3, "listed": 4, "cost": 6, "scale": 7, "root": 14, "size": 18}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab", 0), ("vocab", 1 << 30), ("frequent", VOCAB + 1), ("frequent", 0),
        ("listed", 1 << 31), ("listed", 7), ("cost", np.nan), ("cost", -1.0), ("scale", 1 << 40),
        ("root", 1 << 40), ("size", 1 << 31), ("size", 0),
    ],
)  # fmt: skip
def test_forged_heads_are_refused(field: str, value: float) -> None:
    data = learnt([alike(30, 16)])[0].pack()
    fields = list(HEAD.unpack_from(data))
    fields[FIELDS[field]] = value
    body = HEAD.pack(*fields) + data[HEAD.size : -4]
    with pytest.raises(CorruptPayload):
        Tables.unpack(body + struct.pack("<I", zlib.crc32(body)))
