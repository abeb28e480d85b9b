"""The local cache of remote data files holds, and removes, only its own."""

import os
from pathlib import Path

import fsspec
import pytest

from storage import CorruptShard, LogitDataset, StoreError
from tests.helpers.forged import data_file, read_json, seal
from tests.helpers.records import assert_same, make_dump, random_record


def remote(local: Path, name: str) -> str:
    """A copy of a dump on fsspec's memory file system."""
    fs = fsspec.filesystem("memory")
    for file in local.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"/{name}/{file.relative_to(local)}", file.read_bytes())
    return f"memory://{name}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("MOL_CACHE", str(folder))
    monkeypatch.setattr("storage.store.PATIENCE", 0.01)
    return folder


def test_a_full_cache_loses_only_its_own_files(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dump(tmp_path / "dump", shards=2, rows=3)
    precious = [cache / "results.parquet", cache / f"{'0' * 63}.parquet", cache / "notes.txt"]
    for file in precious:
        file.write_bytes(b"x" * 1000)
        os.utime(file, (0, 0))
    monkeypatch.setenv("MOL_CACHE_GB", "0.000001")  # less than one shard
    for number, record in enumerate(LogitDataset(remote(tmp_path / "dump", f"a{id(cache)}"))):
        assert_same(record, random_record(number))
    assert all(file.exists() for file in precious)
    assert len(list(cache.glob("*.parquet"))) == 3


@pytest.mark.parametrize("value", ["many", "-1", "nan"])
def test_a_limit_that_is_no_number_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    make_dump(tmp_path / "dump", shards=1, rows=3)
    monkeypatch.setenv("MOL_CACHE_GB", value)
    with pytest.raises(StoreError, match=f"MOL_CACHE_GB: expected a number .*, found '{value}'"):
        LogitDataset(remote(tmp_path / "dump", f"b{id(cache)}{value}"))[0]


def test_a_hash_is_not_a_path(tmp_path: Path, cache: Path) -> None:
    """A marker whose sha256 leads out of the cache."""
    dump = tmp_path / "dump"
    make_dump(dump, shards=1, rows=3)
    secret = tmp_path / "private.parquet"
    secret.write_bytes(data_file(dump).read_bytes())
    os.utime(secret, (0, 0))
    seal(dump, marker={"sha256": "../private"})
    with pytest.raises(CorruptShard, match=r"00000/00000\.json: sha256: expected"):
        LogitDataset(remote(dump, f"c{id(cache)}"))[0]
    assert secret.stat().st_mtime == 0
    assert read_json(dump / "plan.json")
