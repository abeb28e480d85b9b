"""Plan, writers, markers, manifest, dataset: the commit protocol and random access."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from storage import (
    CorruptShard,
    FormatVersionError,
    IncompleteDump,
    InvalidRecord,
    LogitDataset,
    PlanMismatch,
    Record,
    ShardWriter,
    TopK,
    create_dump,
    verify,
)
from storage.manifest import Dump
from storage.shard_reader import ShardReader
from tests.fuzz.corrupt_shard import corrupt
from tests.helpers.records import assert_same, make_dump, plan, random_record

CODECS = pytest.mark.parametrize("codec", ["v1", "v2"])


@CODECS
def test_rows_come_back_in_order(tmp_path: Path, codec: str) -> None:
    make_dump(tmp_path, shards=2, rows=5, partitions=2, codec=codec)
    dataset = LogitDataset(tmp_path)
    assert len(dataset) == 20
    for index in [*range(20), 3, 17, -1]:
        assert_same(dataset[index], random_record(index % 20))
    np.testing.assert_array_equal(dataset.lengths, np.full(20, 20))
    with pytest.raises(IndexError):
        dataset[20]
    report = verify(tmp_path)
    assert report.ok
    assert (report.rows, report.tokens, report.shards) == (20, 400, 4)


@CODECS
def test_row_groups_are_crossed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    monkeypatch.setattr("storage.shard_writer.ROW_GROUP_TOKENS", 60)
    make_dump(tmp_path, shards=1, rows=10, codec=codec)
    dataset = LogitDataset(tmp_path)
    assert dataset._reader(0).file.num_row_groups == 4
    for index in np.random.default_rng(0).permutation(10):
        assert_same(dataset[index], random_record(int(index)))


def test_rows_read_together_open_each_row_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.shard_writer.ROW_GROUP_TOKENS", 60)
    monkeypatch.setattr("storage.dataset.CACHED_GROUPS", 1)
    make_dump(tmp_path, shards=2, rows=10)
    dataset, opened = LogitDataset(tmp_path), []
    read_group = ShardReader.read_group

    def counted(reader: ShardReader, group: int) -> object:
        opened.append((reader.name, group))
        return read_group(reader, group)

    monkeypatch.setattr(ShardReader, "read_group", counted)
    order = [*np.random.default_rng(0).permutation(20).tolist(), 7, -1]
    for index, record in zip(order, dataset.read(order), strict=True):
        assert_same(record, random_record(index % 20))
    assert len(opened) == len(set(opened)) == 8
    with pytest.raises(IndexError):
        dataset.read([0, 20])
    assert dataset.read([]) == []


@CODECS
def test_a_shard_without_rows(tmp_path: Path, codec: str) -> None:
    make_dump(tmp_path, shards=1, rows=0, codec=codec)
    assert len(LogitDataset(tmp_path)) == 0
    assert verify(tmp_path).ok


def test_a_codec_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatVersionError, match="codec is 'v3'"):
        make_dump(tmp_path, codec="v3")


@CODECS
def test_golden_dumps_are_read_for_ever(codec: str) -> None:
    """tests/storage/golden holds what the first release of each version wrote."""
    folder = Path(__file__).parent / "golden"
    dataset, expected = LogitDataset(folder / codec), np.load(folder / "expected.npz")
    assert verify(folder / codec).ok
    for number in range(4):
        names = ("input_ids", "counts", "ids", "logprobs", "tail_logprob")
        input_ids, *arrays = (expected[f"{name}_{number}"] for name in names)
        wanted = Record(f"doc-{number}", 0, input_ids, TopK(*arrays))
        assert_same(dataset[number], wanted, tolerance=1e-5)


@CODECS
def test_pickled_dataset_reads_the_same(tmp_path: Path, codec: str) -> None:
    make_dump(tmp_path, codec=codec)
    dataset = LogitDataset(tmp_path)
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.fingerprint == dataset.fingerprint
    assert_same(copy[7], dataset[7])


def test_another_plan_is_refused_with_the_difference(tmp_path: Path) -> None:
    create_dump(tmp_path, plan(teacher={"name": "a", "dtype": "bfloat16"}))
    create_dump(tmp_path, plan(teacher={"name": "a", "dtype": "bfloat16"}))  # the same: opens
    with pytest.raises(PlanMismatch) as refused:
        create_dump(tmp_path, plan(teacher={"name": "b", "dtype": "bfloat16"}, k=9))
    lines = str(refused.value).splitlines()[1:-1]
    assert lines == [
        "  k: 8 in the dump, 9 asked for",
        "  teacher.name: 'a' in the dump, 'b' asked for",
    ]


def test_nothing_is_visible_before_the_marker(tmp_path: Path) -> None:
    dump = create_dump(tmp_path, plan())
    writer = ShardWriter(dump.partition(0))
    for number in range(1000):
        writer.write(random_record(number))
    assert dump.shards() == []
    with pytest.raises(IncompleteDump, match=r"no manifest\.json"):
        LogitDataset(tmp_path)
    writer.commit({"document": 1000})
    assert dump.shards()[0].marker["cursor"] == {"document": 1000}
    assert len(LogitDataset(tmp_path, partial=True)) == 1000
    with pytest.raises(IncompleteDump, match="1 of 1 partitions"):
        dump.finish()


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    dump = create_dump(tmp_path, plan())
    first, second = (ShardWriter(dump.partition(0)) for _ in range(2))
    for number in range(3):
        first.write(random_record(number))
        second.write(random_record(number))
    won = first.commit({"document": 3})
    assert second.commit({"document": 3}) == won
    assert [file.name for file in (tmp_path / "00000").glob("*.parquet")] == [won["file"]]


def test_an_aborted_or_dead_writer_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    dump = create_dump(tmp_path, plan())
    writer = ShardWriter(dump.partition(0))
    writer.write(random_record(0))
    writer.flush()
    writer.abort()
    assert list((tmp_path / "00000").iterdir()) == []
    dead = ShardWriter(dump.partition(0))
    dead.write(random_record(0))
    dead.flush()  # and never comes back
    alive = ShardWriter(dump.partition(0))
    alive.write(random_record(0))
    alive.commit({})
    dump.partition(0).finish({})
    dump.finish()
    report = verify(tmp_path)
    assert (report.ok, report.rows, len(report.notes)) == (True, 1, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_names_the_document_and_commits_nothing(tmp_path: Path, value: float) -> None:
    dump = create_dump(tmp_path, plan())
    writer = ShardWriter(dump.partition(0))
    writer.write(random_record(1))
    good = random_record(2)
    good.topk.logprobs[5] = value
    with pytest.raises(InvalidRecord, match="document 'doc-2', chunk 0"):
        writer.write(good)
    writer.abort()
    assert dump.shards() == []


def test_lengths_that_disagree_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(create_dump(tmp_path, plan()).partition(0))
    record = random_record(0)
    with pytest.raises(InvalidRecord, match="20 tokens need 19"):
        writer.write(Record("x", 0, record.input_ids, random_record(1, tokens=30).topk))


def test_no_dump_at_all_says_so(tmp_path: Path) -> None:
    with pytest.raises(IncompleteDump, match=r"no plan\.json"):
        LogitDataset(tmp_path / "nowhere")


def damage_flip(dump: Dump, path: Path) -> str:
    file = path / dump.shards()[0].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    return file.name


def damage_cut(dump: Dump, path: Path) -> str:
    file = path / dump.shards()[1].file
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def damage_missing(dump: Dump, path: Path) -> str:
    file = path / dump.shards()[1].file
    file.unlink()
    return file.name


def damage_missing_marker(dump: Dump, path: Path) -> str:
    """A file without a marker."""
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
    """A shard made under another plan, with its marker, moved in."""
    other = create_dump(path.parent / "other", plan(k=3, codec=dump.plan["codec"]))
    writer = ShardWriter(other.partition(0), index=1)
    for number in range(5, 10):
        writer.write(random_record(number))
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


def test_verify_finds_an_id_that_stands_twice(tmp_path: Path) -> None:
    """Of a writer that is not ours: version 1 can say it, and its checksums are right."""
    writer = ShardWriter(create_dump(tmp_path, plan()).partition(0))
    writer.write(random_record(1))
    grid = writer.pending[0].grid
    grid.ids[9] = grid.ids[8]
    marker = writer.commit({})
    Dump(tmp_path).partition(0).finish({})
    Dump(tmp_path).finish()
    (fault,) = verify(tmp_path).faults
    assert f"{marker['file']}, row 0: position 1: id {grid.ids[8]} appears twice" in fault


@CODECS
def test_reading_a_cut_or_flipped_shard_names_it(tmp_path: Path, codec: str) -> None:
    dump = make_dump(tmp_path, codec=codec)
    names = damage_flip(dump, tmp_path), damage_cut(dump, tmp_path)
    dataset = LogitDataset(tmp_path)
    for name, rows in zip(names, (range(5), range(5, 10)), strict=True):
        with pytest.raises(CorruptShard, match=name):
            [dataset[row] for row in rows]


@CODECS
def test_every_changed_byte_of_a_shard_is_detected(tmp_path: Path, codec: str) -> None:
    """A few hundred of what tests/fuzz/corrupt_shard.py does a hundred thousand times."""
    dump = make_dump(tmp_path, shards=1, rows=4, codec=codec)
    found = corrupt(dump, 300, np.random.default_rng(1))
    assert sum(found.values()) == 300
    assert found["by the hash and by reading"] > 280
