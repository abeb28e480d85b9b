"""The index of a dump: its bytes, and what becomes of damaged and of forged ones."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import CorruptIndex, FormatVersionError, LogitDataset, StorageError, verify
from storage.index import HEADER, SHARD, Index, Part, agrees, entries_of, entry_type, pack_index
from tests.fuzz.corrupt_shard import digest
from tests.helpers.forged import index_file, seal_index
from tests.helpers.records import TARGETS, make_dump

KEY, PLAN = "12" * 32, "34" * 32
numbers = st.integers(0, (1 << 63) - 1)
sizes = st.integers(0, (1 << 32) - 1)


@st.composite
def parts(draw: st.DrawFn) -> list[Part]:
    sampled, masked = draw(st.booleans()), draw(st.booleans())
    found = []
    for rows in draw(st.lists(st.integers(0, 5), max_size=5)):

        def some(of: st.SearchStrategy[int], rows: int = rows) -> list[int]:
            return draw(st.lists(of, min_size=rows, max_size=rows))

        heads = [bytes([n % 256]) * (n % 40) for n in some(sizes)] if draw(st.booleans()) else None
        samples = (some(numbers), some(sizes)) if sampled else None
        lengths = [len(head) for head in heads] if heads is not None else None
        entries = entries_of(some(numbers), some(sizes), samples, lengths)
        tokens = np.array(some(st.integers(2, 1 << 20)), np.int32)
        targets = np.array(some(st.integers(1, 1 << 20)), np.int32) % tokens
        tables, own = (draw(numbers), draw(sizes)), np.maximum(targets, 1) if masked else None
        found.append(Part(tokens, entries, tables, b"".join(heads or []), own))
    return found


@given(parts())
def test_round_trip(given: list[Part]) -> None:
    index = Index(pack_index(given, KEY, PLAN), "x", KEY, PLAN)
    assert len(index.shards) == len(given)
    np.testing.assert_array_equal(index.lengths, np.concatenate([[], *(p.tokens for p in given)]))
    counted = [part.tokens if part.targets is None else part.targets for part in given]
    np.testing.assert_array_equal(index.target_counts, np.concatenate([[], *counted]))
    for number, part in enumerate(given):
        assert agrees(index, number, part)
        index.check_shard(number, len(part.tokens), *part.counts.sum(axis=1).tolist())
        for row in range(len(part.tokens)):
            place = index.place(number, row, 1 << 64)
            entry = part.entries[row]
            assert place.targets == counted[number][row]
            assert place[:3] == (part.tokens[row], entry["offset"], entry["size"])
            if "samples_size" in entry.dtype.names:
                assert place.samples == (entry["samples_offset"], entry["samples_size"])
            if "head_size" in entry.dtype.names and entry["head_size"]:
                at, size = int(entry["head_offset"]), int(entry["head_size"])
                assert place.head == part.heads[at : at + size]
            else:
                assert place.head is None


def test_targets_of_rows_are_compared_and_bounded() -> None:
    tokens, entries = np.array([5, 7], np.int32), entries_of([0, 0], [0, 0])

    def index_of(targets: list[int] | None) -> tuple[Index, Part]:
        own = None if targets is None else np.array(targets, np.int32)
        part = Part(tokens, entries, (0, 0), b"", own)
        return Index(pack_index([part], KEY, PLAN), "x", KEY, PLAN), part

    (masked, _), (plain, bare) = index_of([1, 6]), index_of(None)
    masked.check_shard(0, 2, 12, 7)
    plain.check_shard(0, 2, 12)
    assert not agrees(masked, 0, index_of([6, 1])[1])
    assert not agrees(masked, 0, bare)
    for expected in ((2, 12, 8), (2, 12)):
        with pytest.raises(CorruptIndex, match="x: 2 rows, 12 tokens, 7 targets in shard 0, its"):
            index_of([1, 6])[0].check_shard(0, *expected)
    with pytest.raises(CorruptIndex, match="2 rows, 12 tokens in shard 0, its marker says 2 rows"):
        index_of(None)[0].check_shard(0, 2, 12, 7)
    for impossible in ([0, 3], [5, 1], [-1, 1]):
        with pytest.raises(CorruptIndex, match="checksum of the tokens"):
            index_of(impossible)[0].target_counts  # noqa: B018


def test_a_row_costs_16_bytes() -> None:
    assert entry_type(0).itemsize + 4 == 16
    one, two = (
        len(
            pack_index(
                [Part(np.ones(n, np.int32), entries_of([0] * n, [0] * n), (0, 0))], KEY, PLAN
            )
        )
        for n in (0, 1000)
    )
    assert two - one == 16_000
    assert one == HEADER.size + SHARD.itemsize


def test_another_dumps_index_is_refused() -> None:
    data = pack_index([], KEY, PLAN)
    for key, plan in ((PLAN, PLAN), (KEY, KEY)):
        with pytest.raises(CorruptIndex, match=r"x: it belongs to another dump; remove the file"):
            Index(data, "x", key, plan)


def test_a_later_version_is_refused_by_name() -> None:
    data = bytearray(pack_index([], KEY, PLAN))
    data[8] = 7
    with pytest.raises(FormatVersionError, match=r"x: index of version 7, .* reads version 1; upd"):
        Index(bytes(data), "x", KEY, PLAN)


def read(path: Path, rows: int) -> tuple[list[bytes], list[int], list[int]]:
    dataset = LogitDataset(path)
    assert len(dataset) == rows
    digests = [digest(dataset[row]) for row in range(rows)]
    return digests, dataset.lengths.tolist(), dataset.target_counts.tolist()


@pytest.mark.parametrize("more", [{}, {"targets": TARGETS}])
def test_damaged_indexes(tmp_path: Path, more: dict) -> None:
    """Any change of a few bytes is an error, or changes nothing."""
    make_dump(tmp_path, shards=3, rows=3, **more)
    truth, rng, file = read(tmp_path, 9), np.random.default_rng(0), index_file(tmp_path)
    good = file.read_bytes()
    found = {"refused": 0, "same": 0}
    for _ in range(750):
        bad = bytearray(good)
        for at in rng.integers(len(bad), size=int(rng.integers(1, 4))):
            bad[at] ^= int(rng.integers(1, 256))
        if rng.random() < 0.2:
            bad = bad[: int(rng.integers(len(bad)))]
        file.write_bytes(bad)
        try:
            assert read(tmp_path, 9) == truth
            found["same"] += 1
        except (CorruptIndex, FormatVersionError) as error:
            found["refused"] += file.name in str(error)
    assert found["refused"] > 745, found


def test_forged_indexes(tmp_path: Path) -> None:
    """Every checksum right and the places wrong: an error or the row itself, never another row."""
    make_dump(tmp_path, shards=2, rows=2, samples=5)
    truth, rng, file = read(tmp_path, 4), np.random.default_rng(0), index_file(tmp_path)
    good = file.read_bytes()
    start = HEADER.size + 2 * SHARD.itemsize + 4 * 4
    size = entry_type(1).itemsize
    wrong = 0
    for case in range(1000):
        bad = bytearray(good)
        row, other = rng.integers(4, size=2)
        if case % 4 == 0:  # the entry of another row
            moved = good[start + size * other : start + size * (other + 1)]
            bad[start + size * row : start + size * (row + 1)] = moved
        elif case % 4 == 1:  # any entry
            field = int(rng.choice([0, 8, 12, 20]))
            kind, most = ("<Q", 1 << 64) if field in (0, 12) else ("<I", 1 << 32)
            (value,) = struct.unpack_from(kind, bad, start + size * row + field)
            near = int(rng.integers(-9, 9))
            value = (value + near if rng.random() < 0.7 else int(rng.integers(1 << 62))) % most
            struct.pack_into(kind, bad, start + size * row + field, value)
        elif case % 4 == 2:  # the tables of a shard, or its first row
            at = HEADER.size + SHARD.itemsize * int(rng.integers(2)) + int(rng.choice([0, 8]))
            struct.pack_into("<Q", bad, at, int(rng.integers(1 << 14)))
        else:  # tokens
            at = HEADER.size + 2 * SHARD.itemsize + 4 * int(row)
            struct.pack_into("<i", bad, at, int(rng.integers(-(1 << 31), 1 << 31)))
        file.write_bytes(seal_index(bytes(bad)))
        try:
            dataset = LogitDataset(tmp_path)
        except StorageError:
            wrong += 1
            continue
        for number in range(4):
            try:
                assert digest(dataset[number]) == truth[0][number]
            except StorageError as error:
                wrong += file.name in str(error) or ".parquet" in str(error)
    assert wrong > 800


def test_forged_targets_are_never_another_rows(tmp_path: Path) -> None:
    """Checksums right: counts that the mask denies, or the marker; no counts at all."""
    make_dump(tmp_path, shards=1, rows=3, targets=TARGETS)
    file = index_file(tmp_path)
    good = file.read_bytes()
    truth = LogitDataset(tmp_path).target_counts.tolist()
    at = HEADER.size + SHARD.itemsize + 4 * 3
    assert struct.unpack_from("<3i", good, at) == tuple(truth)
    for counts in ([truth[0] + 1, truth[1] - 1, truth[2]], [truth[0] + 1, *truth[1:]]):
        bad = good[:at] + struct.pack("<3i", *counts) + good[at + 12 :]
        file.write_bytes(seal_index(bad))
        message = rf"{file.name}: .* targets(, the row's mask has| in shard 0)"
        with pytest.raises(StorageError, match=message):
            LogitDataset(tmp_path)[0]
        assert file.name in verify(tmp_path).faults[0]
    bare = bytearray(good[:at] + good[at + 12 :])
    bare[12] -= 4
    file.write_bytes(seal_index(bytes(bare)))
    with pytest.raises(CorruptIndex, match=f"{file.name}: it and the plan disagree"):
        LogitDataset(tmp_path)


def test_claims_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    data = pack_index([], KEY, PLAN)
    for place, value in [(16, 1 << 63), (24, 1 << 62), (32, 1 << 61), (12, 1 << 31)]:
        bad = bytearray(data)
        struct.pack_into("<Q" if place > 12 else "<I", bad, place, value)
        head = bytes(bad[: HEADER.size - 4])
        bad[HEADER.size - 4 : HEADER.size] = struct.pack("<I", zlib.crc32(head))
        with pytest.raises(CorruptIndex, match=r"expected .* bytes for .* shards and"):
            Index(bytes(bad), "x", KEY, PLAN)
    for short in (b"", data[:10], data[:-1], bytes(200)):
        with pytest.raises(CorruptIndex):
            Index(short, "x", KEY, PLAN)
