"""Store: create-if-absent on a remote store whose answers may be lost."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from storage import CorruptShard, LogitDataset, ShardWriter, StoreError, create_dump, verify
from storage.store import Store, rename_new
from tests.helpers.linked import Counted, counted
from tests.helpers.records import assert_same, plan, random_record


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of fsspec's memory file system for this test alone."""
    monkeypatch.setattr("storage.store.FIRST_PAUSE", 0.001)
    return f"memory://{tmp_path}"


def losing(work: Any, times: int, after: bool) -> Any:
    """`work`, whose request, or its answer if `after`, is lost this many times."""
    left = [times]

    def lossy(*arguments: Any, **named: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            if after:
                work(*arguments, **named)
            raise ConnectionResetError("planted")
        return work(*arguments, **named)

    return lossy


def test_the_first_create_wins(place: str) -> None:
    store = Store(place)
    assert store.create("a.json", b"one")
    assert not store.create("a.json", b"two")
    assert store.read("a.json") == b"one"
    assert store.read("b.json") is None


@pytest.mark.parametrize("after", [False, True])
def test_a_lost_answer_is_not_a_lost_race(
    place: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store created the marker but its answer was lost: the data file must stay."""
    dump = create_dump(place, plan())
    writer = ShardWriter(dump.partition(0))
    for number in range(3):
        writer.write(random_record(number))
    monkeypatch.setattr(dump.store.fs, "pipe_file", losing(dump.store.fs.pipe_file, 2, after))
    marker = writer.commit({})
    dump.partition(0).finish({})
    dump.finish()
    assert verify(place).ok
    assert [shard.marker for shard in LogitDataset(place).shards] == [marker]
    for number, record in enumerate(LogitDataset(place)):
        assert_same(record, random_record(number))
    assert not list(dump.store.remote_staging.iterdir())


def test_patience_ends(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(place)
    store.create("a", b"1")
    monkeypatch.setattr(store.fs, "cat_file", losing(store.fs.cat_file, 3, False))
    assert store.read("a") == b"1"
    monkeypatch.setattr(store.fs, "cat_file", losing(store.fs.cat_file, 10**9, False))
    monkeypatch.setattr("storage.store.PATIENCE", 0.05)
    with pytest.raises(StoreError, match=r"cannot read .*/a: the store did not answer for"):
        store.read("a")


def test_many_files_are_read_as_one_is(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing ones are None, failed ones are repeated, and large ones are refused."""
    store = Store(place)
    for number in range(5):
        store.create(f"{number}", b"x" * number)
    names = [str(number) for number in range(7)]
    expected = {name: b"x" * int(name) if int(name) < 5 else None for name in names}
    assert store.read_many(names, 4) == {name: store.read(name, 4) for name in names} == expected
    monkeypatch.setattr(store.fs, "cat_file", losing(store.fs.cat_file, 3, False))
    monkeypatch.setattr("storage.store.BATCH", 2)
    assert store.read_many(names, 4) == expected
    with pytest.raises(CorruptShard, match="4: expected at most 3 bytes"):
        store.read_many(names, 3)
    with pytest.raises(CorruptShard, match="4: expected at most 3 bytes"):
        store.read("4", 3)


def test_bulk_reads_of_a_store_that_is_down_end(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(place)
    store.create("a", b"1")
    monkeypatch.setattr(store.fs, "cat_file", losing(store.fs.cat_file, 10**9, False))
    monkeypatch.setattr("storage.store.PATIENCE", 0.05)
    with pytest.raises(StoreError, match=r"cannot read .*/a: the store did not answer for"):
        store.read_many(["a"], 9)


@pytest.mark.parametrize("place", ["local", "remote"])
def test_names_begin_with_what_is_asked_for(tmp_path: Path, place: str) -> None:
    (tmp_path / "00000").mkdir()
    files = ["00000/00000.json", "00000/00001.json", "00000/00100.json", "00000/complete.json"]
    for name in [*files, "plan.json"]:
        (tmp_path / name).touch()
    store = Store(tmp_path if place == "local" else counted(tmp_path))
    assert {*files, "plan.json"} <= set(store.names())
    assert store.names("00000/000") == files[:2]
    assert store.names("00000/") == files
    assert store.names("00001/") == store.names("00001/000") == []


def test_an_upload_that_arrives_short_is_done_again(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, whole = Store(place), b"x" * 1000
    (tmp_path / "file").write_bytes(whole)
    put, calls = store.fs.put_file, []

    def short(local: str, remote: str, **named: Any) -> None:
        calls.append(remote)
        put(local, remote, **named)
        if len(calls) == 1:
            store.fs.pipe_file(remote, whole[:100])

    monkeypatch.setattr(store.fs, "put_file", short)
    store.publish(tmp_path / "file", "data")
    assert store.read("data") == whole
    assert len(calls) == 2
    assert not (tmp_path / "file").exists()


def test_only_the_start_of_a_dump_makes_its_directory(tmp_path: Path) -> None:
    store = Store(tmp_path / "gone")
    with pytest.raises(StoreError, match="the directory is gone"):
        store.create("00000/00000.json", b"")
    with pytest.raises(StoreError, match="the directory is gone"):
        store.staging_folder("00000")
    assert not os.path.exists(tmp_path / "gone")


def no_links(*_: Any, **__: Any) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    dump = create_dump(tmp_path, plan())
    first, second = (ShardWriter(dump.partition(0)) for _ in range(2))
    for writer in (first, second):
        writer.write(random_record(0))
    won = first.commit({})
    assert second.commit({}) == won, "the first writer wins"
    dump.partition(0).finish({})
    dump.finish()
    assert verify(tmp_path).ok
    store = Store(tmp_path)
    assert not store.create("plan.json", b"{}")
    assert store.read("plan.json") != b"{}"
    assert not list(tmp_path.rglob(".creating-*"))


def test_a_file_system_that_can_do_neither_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr("storage.store.ctypes.CDLL", lambda *_, **__: object())
    with pytest.raises(StoreError, match=r"plan\.json: the file system has no hard links"):
        create_dump(tmp_path, plan())
    assert list(tmp_path.iterdir()) == []


def test_a_rename_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    rename_new(str(tmp_path / "a"), tmp_path / "b")
    (tmp_path / "c").write_text("c")
    with pytest.raises(FileExistsError):
        rename_new(str(tmp_path / "c"), tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"


def test_staging_is_a_folder_of_ones_own(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.store.tempfile.gettempdir", lambda: str(tmp_path))
    store = Store(place)
    (tmp_path / "elsewhere").mkdir()
    store.remote_staging.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="a link or belongs to another user"):
        store.staging_folder("00000")
    store.remote_staging.unlink()
    assert store.staging_folder("00000").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("place", ["local", "remote"])
def test_the_top_has_the_files_of_the_root_alone(tmp_path: Path, place: str) -> None:
    """In one listing, whatever lies in the folders."""
    (tmp_path / "00000").mkdir()
    for name in ("plan.json", "tables-0.bin", "00000/00000.json"):
        (tmp_path / name).write_bytes(b"abc")
    os.utime(tmp_path / "plan.json", (1e9, 1e9))
    found = Store(tmp_path if place == "local" else counted(tmp_path)).top()
    assert set(found) == {"plan.json", "tables-0.bin"}
    assert found["plan.json"].bytes == 3
    assert found["plan.json"].age > 3600 > found["tables-0.bin"].age
    assert place == "local" or Counted.requests == {"LIST": 1}


def test_what_is_below_no_link_needs_no_look_at_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "dump" / "00000").mkdir(parents=True)
    file = tmp_path / "dump" / "00000" / "file"
    file.write_text("x")
    os.mkfifo(tmp_path / "dump" / "pipe")
    (tmp_path / "dump" / "link").symlink_to(file)
    (tmp_path / "dump" / "folder").symlink_to(file.parent)
    (tmp_path / "root").symlink_to(tmp_path / "dump")
    for root in ("dump", "root"):
        store = Store(tmp_path / root)
        assert store.without_links("00000/file")
        assert store.regular("00000/file") == f"{tmp_path / root}/00000/file"
        for name in ("link", "folder/file", "pipe", "00000", "none", "../dump/00000/file"):
            assert not store.without_links(name)
