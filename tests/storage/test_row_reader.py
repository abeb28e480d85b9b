"""A row costs a row: counts of requests, bytes and openings over many shards."""

import gc
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from storage import CorruptShard, LogitDataset, ShardWriter, create_dump, data_file_writer, verify
from storage.row_head import RowHead
from storage.shard_reader import ShardReader
from tests.helpers.forged import data_file
from tests.helpers.linked import Counted, counted, link_shards, names_ignored
from tests.helpers.records import (
    TARGETS,
    assert_same,
    make_dump,
    masked_record,
    plan,
    random_mask,
    random_record,
)

DRAWS = 12
SHAPES = pytest.mark.parametrize(
    ("codec", "draws"), [("v1", 0), ("v2", 0), ("v3", 0), ("v1", DRAWS), ("v3", DRAWS)]
)
MASKED = {"targets": TARGETS}
ROWS = 4


def linked(path: Path, shards: int, codec: str = "v1", draws: int = 0) -> Path:
    dump = create_dump(path, plan(codec=codec, samples=draws))
    writer = ShardWriter(dump.partition(0))
    for number in range(ROWS):
        writer.write(random_record(number, samples=draws))
    writer.commit({})
    link_shards(path, shards)
    return path


@pytest.fixture
def no_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody opens a shard as Parquet."""

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was opened")

    monkeypatch.setattr(ShardReader, "__init__", refuse)


@pytest.mark.parametrize(
    ("codec", "draws", "more"),
    [
        ("v1", 0, {}), ("v2", 0, {}), ("v3", 0, {}), ("v1", DRAWS, {}), ("v3", DRAWS, {}),
        ("v1", 0, MASKED), ("v2", DRAWS, MASKED), ("v3", DRAWS, MASKED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["local", "remote"])
def test_any_row_is_read_alone(
    tmp_path: Path, codec: str, draws: int, more: dict, place: str, no_readers: None
) -> None:
    """The same rows as in order, from one range each; two with samples; tables once a shard, those
    that shards share once."""
    make_dump(tmp_path, shards=3, rows=ROWS, partitions=2, codec=codec, samples=draws, **more)
    written = masked_record if more else random_record
    dataset = LogitDataset(tmp_path if place == "local" else counted(tmp_path))
    assert len(dataset) == 24
    order = np.random.default_rng(0).permutation(24).tolist()
    Counted.reset()
    for index in order:
        record = dataset[index]
        assert_same(record, written(index, samples=draws))
        assert (record.topk.samples is not None) == (draws > 0)
    rows = 24 * (2 if draws else 1)
    tables = 1 if codec == "v3" else 6
    assert Counted.requests["GET"] == (rows + tables if place == "remote" else 0)
    assert set(Counted.requests) <= {"GET"}
    np.testing.assert_array_equal(dataset.lengths, np.full(24, 20))


def test_without_samples_their_range_is_not_read(tmp_path: Path) -> None:
    make_dump(tmp_path, shards=1, rows=ROWS, samples=DRAWS)
    dataset = LogitDataset(counted(tmp_path), samples=False)
    Counted.reset()
    assert [dataset[index].topk.samples for index in range(ROWS)] == [None] * ROWS
    assert Counted.requests == {"GET": ROWS + 1}


@SHAPES
def test_bytes_are_those_of_the_rows(tmp_path: Path, codec: str, draws: int) -> None:
    """Over 300 shards, shuffled: no byte of another row; tables once."""
    linked(tmp_path, 300, codec, draws)
    with names_ignored():
        dataset = LogitDataset(counted(tmp_path))
        index = dataset._index
        assert index is not None
        names = [name for name in index.entries.dtype.names or () if name.endswith("size")]
        rows = sum(int(index.entries[name].sum()) for name in names)
        tables = int(index.shards["tables_size"].sum())
        tables += sum(file.stat().st_size for file in (tmp_path).glob("tables-*.bin"))
        Counted.reset()
        for at in np.random.default_rng(0).permutation(len(dataset)).tolist():
            dataset[at]
    assert Counted.bytes == rows + tables
    assert Counted.requests["GET"] == (1 if codec == "v3" else 300) + 300 * ROWS * len(names)
    ((_, whole),) = {(s.marker["file"][:5], s.marker["bytes"]) for s in dataset.shards[:1]}
    assert Counted.bytes <= 300 * whole, "less than the files: input ids are not read twice"


def test_the_start_does_not_grow_with_shards(tmp_path: Path, no_readers: None) -> None:
    """Plan, manifest, index; lengths from the index; no file of a shard, and nothing listed."""
    found = []
    for shards in (100, 2000):
        path = linked(tmp_path / str(shards), shards)
        dataset = LogitDataset(counted(path))
        assert (len(dataset), int(dataset.lengths.sum())) == (ROWS * shards, 20 * ROWS * shards)
        assert dataset._manifest is None, "the manifest is not parsed"
        found.append(dict(Counted.requests))
    assert found == [{"GET": 3}, {"GET": 3}]
    with names_ignored():
        assert_same(dataset[ROWS * 1999 + 2], random_record(2))
    assert Counted.requests == {"GET": 5}


def test_local_files_are_opened_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked(tmp_path, 50)
    monkeypatch.setattr("storage.row_reader.OPEN_FILES", 8)

    def open_files() -> int:
        found = 0
        for number in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # that of the listing
                file = Path(os.readlink(f"/proc/self/fd/{number}"))
                found += file.suffix == ".parquet" and file.is_relative_to(tmp_path)
        return found

    with names_ignored():
        dataset = LogitDataset(tmp_path)
        for at in range(0, len(dataset), ROWS):
            dataset[at]
        assert open_files() == 8
        del dataset
        gc.collect()
        assert open_files() == 0


@pytest.mark.parametrize("place", ["local", "remote"])
def test_files_missing_cut_or_swapped_are_named(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.store.PATIENCE", 0.01)
    dump = create_dump(tmp_path, plan())
    for _ in range(3):
        writer = ShardWriter(dump.partition(0))
        for number in range(ROWS):
            writer.write(random_record(number))
        writer.commit({})
    dump.partition(0).finish({})
    dump.finish()
    path = tmp_path if place == "local" else counted(tmp_path)
    files = [data_file(tmp_path, f"00000/0000{number}") for number in range(3)]
    good = [file.read_bytes() for file in files]
    assert len(set(map(len, good))) == 1

    def refused(row: int, message: str) -> None:
        with pytest.raises(CorruptShard, match=rf"{files[row // ROWS].name}.*{message}"):
            LogitDataset(path)[row]

    files[0].write_bytes(good[0][:-300])
    refused(3, "bytes, the marker says|does not match|cut short")
    files[0].unlink()
    refused(0, "the data file is missing, but its marker exists")
    files[1].write_bytes(good[2])
    refused(ROWS, "expected row 0 of shard 00000/00001, .* found row 0 of shard 00000/00002")


def test_another_plans_rows_are_refused(tmp_path: Path) -> None:
    """The whole file of another dump, as large, in the place of this one's."""
    for name in ("a", "b"):
        make_dump(tmp_path / name, shards=1, rows=1, note=name)
    ours, theirs = data_file(tmp_path / "a"), data_file(tmp_path / "b")
    assert ours.stat().st_size == theirs.stat().st_size
    ours.write_bytes(theirs.read_bytes())
    with pytest.raises(CorruptShard, match="made from another plan"):
        LogitDataset(tmp_path / "a")[0]


def test_forked_and_pickled_datasets_read_the_same(tmp_path: Path) -> None:
    import multiprocessing

    make_dump(tmp_path, shards=2, rows=ROWS)
    dataset = LogitDataset(tmp_path)
    dataset[0]
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            for number, record in enumerate(pool.map(dataset.__getitem__, range(2 * ROWS))):
                assert_same(record, random_record(number))


@pytest.mark.parametrize("masked", [True, False])
def test_a_row_has_a_mask_if_and_only_if_the_plan_has_targets(
    tmp_path: Path, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a hostile writer makes it: the head says other than the plan, checksums right."""
    more, other = (MASKED, None) if masked else ({}, random_mask(20))
    head = data_file_writer.RowHead

    def forged(*fields: object) -> RowHead:
        return head(*fields[:7], other)  # type: ignore[arg-type]

    monkeypatch.setattr(data_file_writer, "RowHead", forged)
    dump = make_dump(tmp_path, shards=1, rows=1, **more)
    message = "no mask, but the plan has" if masked else "a mask, but the plan has no"
    with pytest.raises(CorruptShard, match=rf"{dump.shards()[0].file}, row 0 .*has {message} targ"):
        LogitDataset(tmp_path)[0]
    assert "the head in the payload says other than the columns" in verify(tmp_path).faults[0]
