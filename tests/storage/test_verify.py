"""verify names every fault that is planted in a dump."""

import json
from pathlib import Path

import pytest

from storage import LogitDataset, ShardWriter, create_dump, verify
from storage.corpus_list import list_file
from storage.gc import leftovers
from storage.manifest import Dump
from tests.helpers.linked import Counted, counted
from tests.helpers.records import (
    FINGERPRINT,
    cut_short,
    flip_byte,
    make_dump,
    plan,
    random_record,
    some_list,
)

CODECS = pytest.mark.parametrize("codec", ["v1", "v2", "v3"])


def damage_flip(dump: Dump, path: Path) -> str:
    file = path / dump.shards()[0].file
    flip_byte(file)
    return file.name


def damage_cut(dump: Dump, path: Path) -> str:
    file = path / dump.shards()[1].file
    cut_short(file)
    return file.name


def damage_missing(dump: Dump, path: Path) -> str:
    file = path / dump.shards()[1].file
    file.unlink()
    return file.name


def damage_missing_marker(dump: Dump, path: Path) -> str:
    """A data file without its marker."""
    (path / f"{dump.shards()[1].name}.json").unlink()
    return "though its data file"


def damage_missing_shard(dump: Dump, path: Path) -> str:
    """Neither file nor marker."""
    shard = dump.shards()[1]
    (path / shard.file).unlink()
    (path / f"{shard.name}.json").unlink()
    return f"{shard.name}.json: missing"


def damage_extra_marker(dump: Dump, path: Path) -> str:
    """A marker that was made after the manifest."""
    writer = ShardWriter(dump.partition(0))
    writer.write(random_record(99))
    writer.commit({})
    return "00000/00002.json"


def damage_plan(dump: Dump, path: Path) -> str:
    (path / "plan.json").write_text(json.dumps({**dump.plan, "k": 9}))
    return "manifest.json belongs to another plan.json"


def damage_swap(dump: Dump, path: Path) -> str:
    one, other = (path / shard.file for shard in dump.shards()[:2])
    data, foreign = one.read_bytes(), other.read_bytes()
    one.write_bytes(foreign)
    other.write_bytes(data)
    return one.name


def damage_marker(dump: Dump, path: Path) -> str:
    file = path / f"{dump.shards()[1].name}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rows": 4}))
    return file.name


def damage_doubled_row(dump: Dump, path: Path) -> str:
    """A shard that repeats a document, committed as if nothing were wrong."""
    (path / "manifest.json").unlink()
    (path / "00000" / "complete.json").unlink()
    writer = ShardWriter(dump.partition(0))
    writer.write(random_record(3))
    file = writer.commit({})["file"]
    dump.partition(0).finish({})
    dump.finish()
    return str(file)


def damage_other_plan(dump: Dump, path: Path) -> str:
    """A shard of a dump made from another plan, copied in with its marker."""
    other = create_dump(path.parent / "other", plan(k=3, codec=dump.plan["codec"]))
    writer = ShardWriter(other.partition(0), index=1)
    for number in range(5, 10):
        writer.write(random_record(number, k=3))
    marker = writer.commit({})
    (path / "manifest.json").unlink()
    (path / "00000" / marker["file"]).write_bytes(
        (path.parent / "other" / "00000" / marker["file"]).read_bytes()
    )
    (path / "00000" / "00001.json").write_bytes(
        (path.parent / "other" / "00000" / "00001.json").read_bytes()
    )
    dump.finish()
    return str(marker["file"])


@pytest.mark.parametrize(
    "damage",
    [
        damage_flip,
        damage_cut,
        damage_missing,
        damage_missing_marker,
        damage_missing_shard,
        damage_extra_marker,
        damage_plan,
        damage_swap,
        damage_marker,
        damage_doubled_row,
        damage_other_plan,
    ],
)
@CODECS
def test_verify_names_each_planted_fault(tmp_path: Path, damage, codec: str) -> None:  # type: ignore[no-untyped-def]
    dump = make_dump(tmp_path / "dump", codec=codec)
    name = damage(dump, tmp_path / "dump")
    report = verify(tmp_path / "dump")
    assert any(name in fault for fault in report.faults), report


def planted(path: Path) -> list[str]:
    """A dump of six shards with four faults; what names them, in order."""
    dump = make_dump(path, shards=6)
    shards = dump.shards()
    flip_byte(path / shards[1].file)
    (path / shards[3].file).unlink()
    (path / f"{shards[4].name}.json").unlink()
    writer = ShardWriter(dump.partition(0), 6)
    writer.write(random_record(99))
    writer.commit({})
    return [shards[1].file, shards[3].file, f"{shards[4].name}.json", "00000/00006.json"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_faults_come_in_order_whoever_finds_them(tmp_path: Path, jobs: int) -> None:
    expected, seen = planted(tmp_path), []
    report = verify(tmp_path, lambda shard: seen.append(shard.index), jobs=jobs)
    assert len(report.faults) == len(expected)
    for name, fault in zip(expected, report.faults, strict=True):
        assert fault.startswith(name)
    assert (report.shards, report.rows, report.tokens) == (6, 15, 300)
    assert seen == list(range(6))
    assert report == verify(tmp_path)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_row_that_came_before_is_named_with_both_files(tmp_path: Path, jobs: int) -> None:
    """The rest of its shard is not read: rows behind it are not the first ones of others."""
    dump = create_dump(tmp_path, plan())
    for numbers in ([1, 2], [3, 2, 4, 1], [4, 5], [3, 3]):
        writer = ShardWriter(dump.partition(0))
        for number in numbers:
            writer.write(random_record(number))
        writer.commit({})
    dump.partition(0).finish({})
    first, second, _, last = dump.finish().shards
    report = verify(tmp_path, jobs=jobs)
    assert report.faults == [
        f"{second.file}, row 1: document 'doc-2', chunk 0 is already in {first.file}",
        f"{last.file}, row 0: document 'doc-3', chunk 0 is already in {second.file}",
    ]
    assert (report.rows, report.shards) == (4, 4)


def test_a_remote_shard_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its marker and index, and besides the plan (twice), the manifest, the index of all, what
    completes the partition, and a listing. Not from the cache."""
    dump = make_dump(tmp_path / "dump", shards=5)
    monkeypatch.setenv("MOL_CACHE", str(tmp_path / "cache"))
    address = counted(tmp_path / "dump")
    list(LogitDataset(address))
    Counted.reset()
    assert verify(address).ok
    assert Counted.requests == {"GET": 3 * 5 + 5, "LIST": 1}
    size = sum(file.stat().st_size for file in (tmp_path / "dump").rglob("*.parquet"))
    assert size < Counted.bytes < 2 * size
    flip_byte(tmp_path / "dump" / dump.shards()[2].file)
    (fault,) = verify(address).faults
    assert fault.startswith(dump.shards()[2].file)


def test_verify_finds_an_id_that_appears_twice(tmp_path: Path) -> None:
    """A foreign writer can store this in version 1, with correct checksums."""
    writer = ShardWriter(create_dump(tmp_path, plan()).partition(0))
    writer.write(random_record(1))
    grid = writer.pending[0].grid
    grid.ids[9] = grid.ids[8]
    marker = writer.commit({})
    Dump(tmp_path).partition(0).finish({})
    Dump(tmp_path).finish()
    (fault,) = verify(tmp_path).faults
    assert f"{marker['file']}, row 0: position 1: id {grid.ids[8]} appears twice" in fault


def test_a_damaged_list_of_files_is_a_fault(tmp_path: Path) -> None:
    """That of another corpus is never read; gc leaves both."""
    path = tmp_path / "dump"
    corpus = {"corpus": {"fingerprint": FINGERPRINT}}
    dump = make_dump(path, shards=1, rows=2, **corpus)
    other = "corpus-0123456789abcdef.json"
    name = list_file(dump.plan)
    assert name is not None
    for file in (name, other):
        (path / file).write_bytes(some_list(3).pack())
    report = verify(path)
    assert report.ok
    assert report.notes == [f"{other}: the files of another plan's corpus; never read"]
    assert leftovers(path, hours=-1) == []
    flip_byte(path / name)
    (fault,) = verify(path).faults
    assert fault.startswith(name)
