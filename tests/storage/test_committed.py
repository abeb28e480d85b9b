"""The administration of a dump takes one listing and one request for each marker."""

from pathlib import Path
from typing import Any

import pytest

from storage import CorruptShard, Dump, ShardWriter, create_dump
from storage.committed import complete
from storage.gc import leftovers
from storage.index_files import partition_index
from storage.parsing import to_json
from tests.helpers.linked import Counted, counted, link_shards
from tests.helpers.records import TARGETS, make_dump, plan, random_record

SHARDS, PARTITIONS = 100, 10  # shards of each partition


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A remote dump of 1,000 shards, whose ten partitions are complete."""
    path = tmp_path_factory.mktemp("many") / "dump"
    writer = ShardWriter(create_dump(path, plan(partitions=PARTITIONS)).partition(0))
    writer.write(random_record(0))
    writer.commit({})
    for partition in range(PARTITIONS):
        link_shards(path, SHARDS, partition)
        Dump(counted(path)).partition(partition).finish({"documents": 300})
    return path


def unfinished(path: Path) -> None:
    """Remove what Dump.finish wrote."""
    for file in (*path.glob("rows-*.index"), path / "manifest.json"):
        file.unlink()


def test_a_thousand_shards_are_finished_in_1100_requests(many: Path) -> None:
    manifest = Dump(counted(many)).finish()
    assert sum(Counted.requests.values()) <= 1100
    assert Counted.requests["LIST"] == 1
    assert len(manifest.shards) == PARTITIONS * SHARDS
    assert len(list(many.glob("rows-*.index"))) == 1
    unfinished(many)


def test_garbage_is_found_with_one_listing(many: Path) -> None:
    stray = many / "00003" / "00007-feedbeef0123.parquet"
    stray.write_bytes(b"x")
    address = counted(many)
    assert [one.name for one in leftovers(address, -1)] == ["00003/00007-feedbeef0123.parquet"]
    assert Counted.requests["LIST"] == 1
    assert sum(Counted.requests.values()) <= 1100
    stray.unlink()


def test_what_one_listing_found_is_read_once(many: Path) -> None:
    committed = Dump(counted(many)).now()
    assert committed.incomplete == []
    before = Counted.requests["GET"]
    for _ in range(2):
        assert len(committed.shards([3, 4])) == 2 * SHARDS
        assert committed.summaries([3]) != [None]
    assert Counted.requests["GET"] - before == 2 * SHARDS + 1
    assert Counted.requests["LIST"] == 1


def test_a_marker_that_appears_after_the_listing_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is committed while gc runs is no leftover."""
    dump = make_dump(tmp_path)
    (tmp_path / "manifest.json").unlink()
    entries = dump.store.entries()
    del entries["00000/00001.json"]
    monkeypatch.setattr("storage.store.Store.entries", lambda _: entries)
    assert not [one.name for one in leftovers(tmp_path, -1) if one.name.startswith("00000")]


@pytest.mark.parametrize("shards", [0, 1, 99, 100, 101, 10_000])
def test_the_next_shard_is_found_in_as_many_requests(tmp_path: Path, shards: int) -> None:
    writer = ShardWriter(create_dump(tmp_path, plan()).partition(0), 0)
    writer.write(random_record(0))
    marker = writer.commit({})
    (tmp_path / "00000/00000.json").unlink()
    for number in range(shards):
        named = {**marker, "file": f"{number:05d}-0123456789ab.parquet"}
        (tmp_path / f"00000/{number:05d}.json").write_bytes(to_json(named))
    (tmp_path / f"00000/{shards:05d}-0123456789ab.parquet").touch()  # not committed
    assert Dump(tmp_path).partition(0).next == shards
    partition = Dump(counted(tmp_path)).partition(0)
    Counted.reset()
    found = [shard.index for shard in partition.latest(2)]
    assert found == list(range(max(0, shards - 2), shards))
    assert sum(Counted.requests.values()) == 12 + len(found)


def test_a_partition_may_have_more_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.manifest.BLOCKS", 2)
    dump = make_dump(tmp_path, shards=1)
    marker = dump.shards()[0].marker
    for number in range(1, 905):
        named = {**marker, "file": f"{number:05d}-0123456789ab.parquet"}
        (tmp_path / f"00000/{number:05d}.json").write_bytes(to_json(named))
    assert [shard.index for shard in dump.partition(0).latest()] == [904]


def test_a_lost_marker_of_a_complete_partition_is_named(tmp_path: Path) -> None:
    """Otherwise the manifest would leave out the shards behind it."""
    make_dump(tmp_path, shards=4, partitions=2)
    unfinished(tmp_path)
    (tmp_path / "00001/00002.json").unlink()
    expected = r"00001/complete\.json: expected markers of 4 shards, found 2: .*00001/00002\.json"
    with pytest.raises(CorruptShard, match=expected):
        Dump(tmp_path).finish()
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("changes", [{}, {"targets": TARGETS}, {"samples": 5}, {"codec": "v2"}])
def test_the_index_is_the_same_whoever_joins_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    """From those of partitions, where these are there, or from those of shards."""
    make_dump(tmp_path, shards=3, partitions=2, **changes)
    (index,) = tmp_path.glob("rows-*.index")
    expected = index.read_bytes()
    unfinished(tmp_path)
    remote = Dump(counted(tmp_path))
    for partition in remote.partitions:
        (tmp_path / complete(partition.index)).unlink()
        partition.finish({})
    for file in tmp_path.glob("*/0*.index"):
        file.unlink()
    remote.finish()
    assert index.read_bytes() == expected


@pytest.mark.parametrize("harm", ["of other shards", "of fewer", "damaged"])
def test_an_index_of_a_partition_that_is_not_of_its_shards_is_not_used(
    tmp_path: Path, harm: str
) -> None:
    make_dump(tmp_path, shards=3, partitions=2)
    (index,) = tmp_path.glob("rows-*.index")
    expected = index.read_bytes()
    unfinished(tmp_path)
    partitions = Dump(counted(tmp_path)).partitions
    shards = partitions[0].shards
    partitions[1 if harm == "of other shards" else 0].join(shards[: 2 if harm == "of fewer" else 3])
    if harm == "damaged":
        file = tmp_path / partition_index(0)
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    Dump(tmp_path).finish()
    assert index.read_bytes() == expected


def test_a_damaged_index_of_a_shard_is_not_joined(tmp_path: Path) -> None:
    make_dump(tmp_path)
    (index,) = tmp_path.glob("rows-*.index")
    unfinished(tmp_path)
    (own,) = tmp_path.glob("00000/00001-*.index")
    data = bytearray(own.read_bytes())
    data[-3] ^= 1
    own.write_bytes(data)
    Dump(tmp_path).finish()
    assert not index.exists()
