"""LogitDataset: the rows of a dump by index, in any order and in any process."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from storage import CorruptShard, IncompleteDump, LogitDataset, ShardWriter, create_dump, verify
from storage.shard_reader import ShardReader
from tests.helpers.records import (
    TARGETS,
    assert_same,
    make_dump,
    masked_record,
    plan,
    random_record,
)

CODECS = pytest.mark.parametrize("codec", ["v1", "v2", "v3"])
SHAPES = pytest.mark.parametrize(
    ("codec", "k"), [("v1", 8), ("v2", 8), ("v3", 8), ("v1", 0), ("v2", 0), ("v3", 0)]
)
DRAWS = 12


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
    dataset, opened = LogitDataset(tmp_path, partial=True), []  # without an index
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
def test_pickled_dataset_reads_the_same(tmp_path: Path, codec: str) -> None:
    make_dump(tmp_path, codec=codec)
    dataset = LogitDataset(tmp_path)
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.fingerprint == dataset.fingerprint
    assert_same(copy[7], dataset[7])


@CODECS
def test_target_counts_are_those_of_the_rows(tmp_path: Path, codec: str) -> None:
    """With an index, without one, and where all tokens are learnt."""
    make_dump(tmp_path / "masked", partitions=2, codec=codec, targets=TARGETS)
    expected = [len(masked_record(number).positions) for number in range(20)]
    assert len(set(expected)) > 1
    for partial in (False, True):
        dataset = LogitDataset(tmp_path / "masked", partial=partial)
        assert dataset.target_counts.tolist() == expected
        assert dataset.target_counts.dtype == np.int32
        assert dataset.lengths.tolist() == [20] * 20
        assert (dataset._readers == {}) == (not partial)
    make_dump(tmp_path / "plain", codec=codec)
    for partial in (False, True):
        dataset = LogitDataset(tmp_path / "plain", partial=partial)
        assert dataset.target_counts.tolist() == dataset.lengths.tolist() == [20] * 10
    make_dump(tmp_path / "empty", shards=0, codec=codec, targets=TARGETS)
    assert LogitDataset(tmp_path / "empty").target_counts.tolist() == []


def test_readers_of_a_growing_dump_see_a_prefix_that_stays(tmp_path: Path) -> None:
    dump = create_dump(tmp_path, plan())
    seen: list[LogitDataset] = []
    for shard in range(4):
        seen.append(LogitDataset(tmp_path, partial=True))
        writer = ShardWriter(dump.partition(0))
        for number in range(5):
            writer.write(random_record(5 * shard + number))
            assert len(LogitDataset(tmp_path, partial=True)) == 5 * shard
        writer.commit({})
    for shards, dataset in enumerate(seen):
        assert [record.doc_id for record in dataset] == [f"doc-{n}" for n in range(5 * shards)]
    report = verify(tmp_path, partial=True)
    assert (report.ok, report.rows) == (True, 20)
    with pytest.raises(IncompleteDump):
        verify(tmp_path)
    (tmp_path / "00000" / "00002.json").write_text("[]")
    with pytest.raises(CorruptShard, match=r"00002\.json"):
        LogitDataset(tmp_path, partial=True)


@SHAPES
def test_shards_hold_samples(tmp_path: Path, codec: str, k: int) -> None:
    make_dump(tmp_path, codec=codec, k=k, samples=DRAWS)
    dataset, bare = LogitDataset(tmp_path), LogitDataset(tmp_path, samples=False)
    assert (dataset.draws, bare.draws) == (DRAWS, 0)
    for index in (7, 0, 9, -1):
        expected = random_record(index % 10, k=k, samples=DRAWS).topk.samples
        found = dataset[index].topk
        assert found.samples is not None
        assert expected is not None
        assert found.samples.same(expected)
        assert set(found.counts.tolist()) == {k}
        np.testing.assert_allclose(found.spread_tail().kept_mass(), 1, atol=1e-5)
        assert bare[index].topk.samples is None
        np.testing.assert_array_equal(bare[index].topk.ids, found.ids)
    report = verify(tmp_path)
    assert (report.ok, report.rows) == (True, 10), report
