"""The cache of ranges: what is fetched once, what is never trusted, what is removed."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import CorruptShard, LogitDataset, StoreError
from storage.cache import RangeCache, Room, too_small
from tests.helpers.forged import data_file
from tests.helpers.linked import Counted, Meeting, counted
from tests.helpers.records import assert_same, make_dump, random_record

ROWS = 12
OLD = 1_000_000_000.0  # seconds since 1970


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("storage.store.PATIENCE", 0.01)
    return tmp_path / "cache"


def remote(tmp_path: Path, **options: Any) -> str:
    make_dump(tmp_path / "dump", shards=3, rows=4, **options)
    return counted(tmp_path / "dump")


@pytest.mark.parametrize(("codec", "samples"), [("v1", 0), ("v2", 0), ("v3", 0), ("v1", 5)])
def test_ranks_that_share_a_cache_fetch_the_dump_once(
    tmp_path: Path, cache: Path, codec: str, samples: int
) -> None:
    """Four readers, two passes in orders of their own: each row and table is fetched once."""
    path = remote(tmp_path, codec=codec, samples=samples)
    ranks = [LogitDataset(path) for _ in range(4)]
    Counted.reset()
    for epoch in range(2):
        for rank, dataset in enumerate(ranks):
            order = np.random.default_rng(epoch).permutation(ROWS)[rank::4].tolist()
            for index, record in zip(order, dataset.read(order), strict=True):
                assert_same(record, random_record(index, samples=samples))
    assert Counted.requests == {"GET": ROWS * (2 if samples else 1) + (1 if codec == "v3" else 3)}
    files = [*(tmp_path / "dump").rglob("*.parquet"), *(tmp_path / "dump").glob("tables-*")]
    assert Counted.bytes < sum(file.stat().st_size for file in files)


def test_a_range_that_was_not_written_whole_is_fetched_again(tmp_path: Path, cache: Path) -> None:
    path = remote(tmp_path)
    LogitDataset(path).read(range(ROWS))
    for file in cache.glob("*.rows"):
        file.write_bytes(file.read_bytes()[:-900].ljust(file.stat().st_size, b"\0"))
    Counted.reset()
    for index, record in enumerate(LogitDataset(path).read(range(ROWS))):
        assert_same(record, random_record(index))
    assert 0 < Counted.requests["GET"] < ROWS


def test_damage_of_the_store_does_not_enter_the_cache(tmp_path: Path, cache: Path) -> None:
    path, file = remote(tmp_path), data_file(tmp_path / "dump")
    good = file.read_bytes()
    file.write_bytes(bytes(len(good)))
    for _ in range(2):
        with pytest.raises(CorruptShard, match=r"00000/00000-.*row 0"):
            LogitDataset(path).read([0, 1])
    file.write_bytes(good)
    assert_same(LogitDataset(path)[0], random_record(0))


def test_a_full_cache_takes_no_more_and_loses_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for some rows: those are not fetched again, and no row pushes another one out."""
    path = remote(tmp_path)
    size = sum(file.stat().st_size for file in (tmp_path / "dump").rglob("*.parquet"))
    monkeypatch.setenv("MOL_CACHE_GB", str(size / 2 / 1e9))
    dataset = LogitDataset(path)
    dataset.read(range(ROWS))
    fetched = []
    for _ in range(2):
        Counted.reset()
        for index, record in enumerate(dataset.read(range(ROWS))):
            assert_same(record, random_record(index))
        fetched.append(Counted.requests["GET"])
    assert 0 < fetched[0] == fetched[1] < ROWS


def test_shards_that_nobody_uses_make_room(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    old = [cache / f"{'a' * 64}.{kind}" for kind in ("rows", "have", "parquet")]
    young, foreign = cache / f"{'b' * 64}.rows", cache / "results.rows"
    for file in (*old, young, foreign):
        file.write_bytes(b"x" * 8192)
    for file in (*old, foreign):
        os.utime(file, (OLD, OLD))
    monkeypatch.setenv("MOL_CACHE_GB", str(30_000 / 1e9))
    kept = RangeCache(Room(cache), "c" * 64)
    kept.put(0, b"y" * 10_000)
    assert kept.get(0, 10_000) == b"y" * 10_000
    assert not any(file.exists() for file in old)
    assert young.exists()
    assert foreign.exists()


def test_a_range_is_its_offset_and_its_size(cache: Path) -> None:
    mine, others = (RangeCache(Room(cache), "a" * 64) for _ in range(2))
    assert mine.get(7, 3) is None
    others.put(7, b"abc")
    assert mine.get(7, 3) == b"abc"
    assert mine.get(7, 2) is mine.get(8, 2) is None


def test_a_whole_shard_in_the_cache_serves_its_rows(tmp_path: Path, cache: Path) -> None:
    path = remote(tmp_path)
    list(LogitDataset(path))  # in order: whole files
    Counted.reset()
    LogitDataset(path).read(range(ROWS))
    assert set(Counted.requests) <= {"GET"}
    assert Counted.requests["GET"] == 2, "plan and manifest"


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = remote(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOL_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"MOL_CACHE .*file: cannot be written"):
        LogitDataset(path)[0]


def test_rows_are_requested_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dump(tmp_path, shards=3, rows=4)
    dataset = LogitDataset(f"meeting://{tmp_path}")
    dataset[0], dataset[4], dataset[8]  # the tables
    order = [7, 1, 11, 5]
    monkeypatch.setattr(Meeting, "barrier", threading.Barrier(len(order)))
    for index, record in zip(order, dataset.read(order), strict=True):
        assert_same(record, random_record(index))


def test_one_row_that_fails_fails_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.store.PATIENCE", 0.01)
    path = remote(tmp_path)
    dataset = LogitDataset(path)
    dataset.read(range(ROWS))
    data_file(tmp_path / "dump").unlink()
    with pytest.raises(CorruptShard, match=r"00000/00000-.*row 1: the data file is missing"):
        dataset.read([9, 1, 5])


def test_a_cache_that_is_smaller_than_the_dumps_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOL_CACHE_GB", "2")
    assert "the cache holds 2 GB, the dumps have 3.5" in (too_small(3_500_000_000) or "")
    assert too_small(2_000_000_000) is None
    monkeypatch.delenv("MOL_CACHE")
    assert too_small(3_500_000_000) is None
