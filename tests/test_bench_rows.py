"""The law of bench_rows.py: a row costs a row, however many shards there are."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from storage import index_files
from tests.helpers.linked import counted, names_ignored
from tests.helpers.paths import ROOT
from tests.helpers.records import VOCAB, random_record

sys.path.append(str(ROOT / "scripts" / "benchmarks"))
bench: Any = importlib.import_module("bench_rows")

ROWS, SHARDS = 8, (10, 200)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_files, "user_cache", lambda: tmp_path / "cache")


def law(cost: Any, codec: str, shards: int, order: str) -> None:
    """Of 200 rows: one request each and no bytes but theirs; the tables of version 1 lie in the
    shards, and their first rows read them."""
    tables = min(shards, 200) if codec == "v1" and order == "shuffled" else 1 + 200 // ROWS
    tables = tables if codec == "v1" else 1
    assert cost.openings == 0
    assert 1 <= cost.requests <= 1 + tables / 200
    assert cost.start_requests == 3


@pytest.mark.parametrize("codec", ["v1", "v3"])
def test_a_row_is_one_request_and_the_start_three(tmp_path: Path, codec: str) -> None:
    rows = [random_record(number, tokens=200) for number in range(ROWS)]
    for shards in SHARDS:
        path = bench.linked(tmp_path, rows, VOCAB, codec, shards)
        for order in bench.ORDERS:
            (tmp_path / "cache").exists() and bench.shutil.rmtree(tmp_path / "cache")
            with names_ignored():
                cost = bench.counts(counted(path), path, order, 200, 0, bench.by_files)
                bench.times(cost, path, order, 20, 0)
            law(cost, codec, shards, order)
            tables = sum(file.stat().st_size for file in path.glob("tables-*"))
            whole = 200 * bench.row_bytes(path) * cost.bytes - tables
            assert whole <= 1.2 * 200 * bench.row_bytes(path)
            assert cost.us > 0


def test_warm_rows_of_version_1_read_no_tables(tmp_path: Path) -> None:
    rows = [random_record(number, tokens=200) for number in range(ROWS)]
    path = bench.linked(tmp_path, rows, VOCAB, "v1", 10)
    with names_ignored():
        cost = bench.counts(counted(path), path, "shuffled", 100, 200, bench.by_files)
    assert (cost.requests, cost.openings) == (1, 0)


@pytest.mark.parametrize("codec", ["v3"])
def test_the_same_on_s3(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server, and a proxy that counts."""
    import fsspec

    rows = [random_record(number, tokens=100) for number in range(ROWS)]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")  # and back after the test
    starts = []
    with bench.s3() as (copied, asked):
        for shards in (5, 40):
            path = bench.linked(tmp_path, rows, VOCAB, codec, shards)
            with names_ignored():
                cost = bench.counts(copied(path, path.name), path, "shuffled", 60, 0, asked)
            assert cost.openings == 0
            assert cost.requests <= 1.1
            starts.append(cost.start_requests)
    assert starts[0] == starts[1]
    fsspec.get_filesystem_class("s3").clear_instance_cache()
