"""The tables of version 3: what they learn, and what is refused of their bytes."""

import struct
import zlib

import numpy as np
import pytest

from storage import CorruptPayload, FormatVersionError
from storage.codec.codec import pack, unpack
from storage.codec.root_grid import quantise
from storage.codec.v3_learning import learn
from storage.codec.v3_tables import HEAD, Tables
from tests.helpers.records import VOCAB
from tests.storage.codec.test_v3 import STEP, alike, flipped, learnt


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
    tables = Tables.unpack(learn([], VOCAB).pack(), VOCAB)
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
