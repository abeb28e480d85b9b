"""Which tables a shard takes: the dump's, where they fit, and its own where none do."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage import CorruptShard, Dump, LogitDataset, Record, ShardWriter, TopK, create_dump, verify
from storage.dump_tables import tables_file
from storage.shared_tables import SharedTables
from tests.helpers.records import VOCAB, assert_same, plan

K, TOKENS, LEARN, GROUP = 8, 40, 1200, 200


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, float] = {
        "LEARN_POSITIONS": LEARN,
        "FEW": LEARN // 4,
        "LEAST": 60,
        "SHOWN": GROUP,
    }
    sizes["FITS"] = 1.15  # so few rows differ more
    for name, size in sizes.items():
        monkeypatch.setattr(f"storage.shared_tables.{name}", size)
    monkeypatch.setattr("storage.shard_writer.ROW_GROUP_TOKENS", GROUP)


def record(number: int, kind: int = 0) -> Record:
    """A row whose distributions follow its tokens, in a way of its kind of text."""
    rng = np.random.default_rng(number)
    ids = rng.integers(0, 20, TOKENS).astype(np.int32)
    start = np.random.default_rng(kind).permutation(VOCAB - K)[ids[:-1]]
    kept = start[:, None] + np.arange(K)
    p = np.array([0.4, 0.2, 0.1, 0.08, 0.05, 0.04, 0.03, 0.02]) * rng.uniform(
        0.9, 1, (TOKENS - 1, K)
    )
    p = -np.sort(-p, axis=1)
    tail = np.log1p(-p.sum(axis=1)).astype(np.float32)
    topk = TopK(
        np.full(TOKENS - 1, K, np.uint16),
        kept.reshape(-1).astype(np.int32),
        np.log(p).reshape(-1).astype(np.float32),
        tail,
    )
    return Record(f"doc-{number}", 0, ids, topk)


def write(dump: Dump, rows: int, kind: int = 0, partition: int = 0, first: int = 0) -> str:
    """Commit a shard; returns the sha256 of its tables."""
    part = dump.partition(partition)
    writer = ShardWriter(part)
    first = first or 1000 * partition + 100 * writer.index
    for number in range(first, first + rows):
        writer.write(record(number, kind))
    marker = writer.commit({"document": 0})
    assert writer.file is not None
    return str(marker["tables"])


def new(path: Path, partitions: int = 1) -> Dump:
    return create_dump(path, plan(codec="v3", k=K, partitions=partitions))


def finish(dump: Dump) -> None:
    for partition in dump.partitions:
        partition.finish({})
    dump.finish()
    assert verify(dump.store.path).ok


def files(path: Path) -> set[str]:
    return {file.name for file in path.glob("tables-*.bin")}


def test_one_set_serves_a_dump(tmp_path: Path) -> None:
    """Shards after the first one of a partition, and partitions of other machines."""
    dump = new(tmp_path, 3)
    found = {write(dump, 50), write(dump, 50)}
    found |= {write(Dump(tmp_path), 50, partition=number) for number in (1, 2)}
    found.add(write(Dump(tmp_path), 3, partition=2))
    assert files(tmp_path) == {tables_file(sha256) for sha256 in found}
    assert len(found) == 1
    finish(dump)
    dataset = LogitDataset(tmp_path)
    assert len(dataset) == 203
    for index in (0, 50, 149, 202):
        number = index if index < 50 else int(dataset[index].doc_id[4:])
        assert_same(dataset[index], record(number))


def test_each_kind_of_text_has_its_own(tmp_path: Path) -> None:
    """In the worst order: another kind of text in each shard, and by other machines."""
    dump, kinds = new(tmp_path), [0, 1, 2, 0, 1, 2, 2, 0]
    found = [
        write(dump if number % 2 else Dump(tmp_path), 50, kind) for number, kind in enumerate(kinds)
    ]
    assert len(set(found)) == len(files(tmp_path)) == 3
    assert [found.index(sha256) for sha256 in found] == [kinds.index(kind) for kind in kinds]
    finish(dump)


def test_rows_of_two_kinds_share_tables(tmp_path: Path) -> None:
    dump = new(tmp_path)
    found = set()
    for shard in range(3):
        writer = ShardWriter(dump.partition(0))
        for number in range(60):
            writer.write(record(100 * shard + number, number % 2))
        found.add(writer.commit({})["tables"])
    assert len(found) == 1
    finish(dump)


def held(writer: ShardWriter, rows: Iterator[Record]) -> list[int]:
    """Positions in memory after each row."""
    found = []
    for row in rows:
        writer.write(row)
        found.append(writer.pending_positions)
    return found


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    """The first shard holds LEARN_POSITIONS at most, the next ones a row group."""
    dump = new(tmp_path)
    for most in (LEARN, GROUP):
        writer = ShardWriter(dump.partition(0))
        found = held(writer, map(record, range(200)))
        assert most - 2 * TOKENS < max(found) < most
        assert max(found[LEARN // TOKENS + 1 :]) < GROUP
        writer.commit({})


def test_many_entries_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory is bounded whatever k is; but not fewer positions than tables are shared from."""
    monkeypatch.setattr("storage.shared_tables.LEARN_ENTRIES", 4 * GROUP * K)
    writer = ShardWriter(new(tmp_path).partition(0))
    found = held(writer, map(record, range(60)))
    assert 4 * GROUP - 2 * TOKENS < max(found) < 4 * GROUP
    writer.abort()
    monkeypatch.setattr("storage.shared_tables.LEARN_ENTRIES", 1)
    writer = ShardWriter(new(tmp_path / "other").partition(0))
    found = held(writer, map(record, range(60)))
    assert LEARN // 4 - 2 * TOKENS < max(found) < LEARN // 4 + TOKENS
    writer.abort()


def test_tables_of_few_positions_serve_short_shards_alone(tmp_path: Path) -> None:
    dump = new(tmp_path)
    few = write(dump, 5)
    assert write(dump, 6) == few
    more = write(dump, 50)
    assert more != few
    assert write(dump, 50) == more
    assert dump.tables.get(few).learnt == 5 * (TOKENS - 1)
    assert dump.tables.get(more).learnt >= LEARN - TOKENS


def test_a_very_short_shard_takes_any(tmp_path: Path) -> None:
    dump = new(tmp_path)
    first = write(dump, 50)
    assert write(dump, 1, kind=1) == first
    assert write(dump, 4, kind=1) in files_by_hash(dump, tmp_path)


def files_by_hash(dump: Dump, path: Path) -> set[str]:
    return {sha256 for sha256 in dump.tables.recent if tables_file(sha256) in files(path)}


def test_a_shard_without_rows_needs_none(tmp_path: Path) -> None:
    dump = new(tmp_path)
    assert "tables" not in ShardWriter(dump.partition(0)).commit({})
    assert write(dump, 3)
    finish(dump)


def test_two_that_learn_at_the_same_time(tmp_path: Path) -> None:
    """The one that is done later takes the tables that the other one has published."""
    new(tmp_path, 2)
    writers = [ShardWriter(Dump(tmp_path).partition(number)) for number in range(2)]
    for number in range(50):
        for index, writer in enumerate(writers):
            writer.write(record(100 * index + number))
    assert len({writer.commit({})["tables"] for writer in writers}) == len(files(tmp_path)) == 1


def test_a_race_makes_two_sets_that_both_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = new(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(SharedTables, "newest", lambda _: [])
        found = {write(Dump(tmp_path), 50, partition=number) for number in range(2)}
    assert len(found) == len(files(tmp_path)) == 2
    assert write(dump, 50) in found
    finish(dump)


def test_of_several_sets_the_best_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a dump has enough of them, text that fits none of them well takes the nearest."""
    dump = new(tmp_path, 3)
    found = [write(dump, 50, kind) for kind in range(4)]
    assert len(set(found)) == 4
    monkeypatch.setattr("storage.shared_tables.FITS", 0.5)
    assert write(dump, 50, 2) == found[2]
    monkeypatch.setattr("storage.shared_tables.SERVES", 0.5)
    assert write(Dump(tmp_path), 50, 2, partition=1) not in found


def test_a_writer_that_died_leaves_tables_for_the_next_one(tmp_path: Path) -> None:
    dump = new(tmp_path)
    dead = ShardWriter(dump.partition(0))
    for number in range(50):
        dead.write(record(number))
    (left,) = files(tmp_path)
    assert tables_file(write(Dump(tmp_path), 50)) == left
    assert files(tmp_path) == {left}


def test_damage_of_the_tables_before_stops_the_writer(tmp_path: Path) -> None:
    sha256 = write(new(tmp_path), 50)
    file = tmp_path / tables_file(sha256)
    file.write_bytes(b"x")
    with pytest.raises(CorruptShard, match=f"{file.name}: the sha256 is"):
        write(Dump(tmp_path), 50)
    assert len(Dump(tmp_path).shards()) == 1


def test_damage_of_other_tables_does_not(tmp_path: Path) -> None:
    dump = new(tmp_path, 2)
    sha256 = write(dump, 50)
    (tmp_path / tables_file(sha256)).write_bytes(b"x")
    assert write(Dump(tmp_path), 50, kind=1, partition=1) != sha256
