"""Where indexes come from: writers, the end of a dump, first use, the command; and the cache."""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from storage import (
    CorruptIndex,
    Dump,
    FormatVersionError,
    LogitDataset,
    Record,
    Samples,
    ShardWriter,
    TopK,
    create_dump,
    verify,
)
from storage import scan as scanning
from storage.__main__ import main
from storage.gc import leftovers
from storage.index import HEADER, SHARD, Part
from storage.manifest import Shard
from tests.helpers.forged import as_before, data_file, index_file, rewrite, seal_index
from tests.helpers.linked import Counted, counted
from tests.helpers.records import (
    TARGETS,
    assert_same,
    make_dump,
    masked_record,
    plan,
    random_record,
)

SAMPLED = ("counts", "ids", "times")
SHAPES = pytest.mark.parametrize(
    ("codec", "draws"), [("v1", 0), ("v2", 0), ("v3", 0), ("v1", 12), ("v3", 12)]
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, of this test alone."""
    monkeypatch.setattr("storage.index_files.user_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def same_rows(path: Path | str, rows: int, draws: int = 0) -> None:
    dataset = LogitDataset(path)
    assert dataset.lengths.tolist() == [20] * rows
    for number in np.random.default_rng(0).permutation(rows).tolist():
        assert_same(dataset[number], random_record(number, samples=draws))


@SHAPES
def test_the_end_of_a_dump_joins_the_indexes(
    tmp_path: Path, codec: str, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shard is read again; what is joined is what a scan finds."""
    with monkeypatch.context() as patch:
        patch.setattr("storage.manifest.Dump.finish", lambda self: None)
        make_dump(tmp_path / "dump", partitions=2, codec=codec, samples=draws)
    dump = Dump(tmp_path / "dump")
    assert len(list((tmp_path / "dump").glob("0000[01]/0000[01]-*.index"))) == 4
    hidden = {file: file.rename(file.with_suffix(".x"))
              for file in (tmp_path / "dump").glob("*/*.parquet")}  # fmt: skip
    manifest = dump.finish()
    for file, moved in hidden.items():
        moved.rename(file)
    dataset = LogitDataset(tmp_path / "dump")
    assert dataset._index is not None
    assert dataset._index.name == index_file(tmp_path / "dump").name
    for file in (tmp_path / "dump").glob("*/*.index"):
        file.unlink()
    scanned = scanning.index_dump(dump, manifest)
    assert bytes(scanned.data) == index_file(tmp_path / "dump").read_bytes()
    same_rows(tmp_path / "dump", 20, draws)


def test_only_committed_shards_are_indexed(tmp_path: Path) -> None:
    """A writer that lost, and one that died, leave nothing in the index."""
    dump = create_dump(tmp_path, plan())
    writers = [ShardWriter(dump.partition(0)) for _ in range(3)]
    for number, writer in enumerate(writers):
        writer.write(random_record(number))
    won = writers[1].commit({})
    assert writers[0].commit({}) == won
    dead = writers[2]
    dead.flush()
    kept = [file.name for file in (tmp_path / "00000").iterdir() if "writing" not in file.name]
    assert sorted(kept) == sorted(["00000.json", won["file"], f"{won['file'][:-8]}.index"])
    dump.partition(0).finish({})
    dump.finish()
    dataset = LogitDataset(tmp_path)
    assert len(dataset) == 1
    assert_same(dataset[0], random_record(1))


@SHAPES
@pytest.mark.parametrize("read_only", [False, True])
def test_a_dump_of_before_is_indexed_on_first_use(
    tmp_path: Path, cache: Path, codec: str, draws: int, read_only: bool
) -> None:
    """In the cache, once; nothing is written into the dump."""
    path = tmp_path / "dump"
    make_dump(path, codec=codec, samples=draws)
    as_before(path)
    there = files(path)
    if read_only:
        path.chmod(0o555)
    assert LogitDataset(path)._index is None
    assert_same(LogitDataset(path)[7], random_record(7, samples=draws))
    same_rows(path, 10, draws)
    assert files(path) == there
    dataset = LogitDataset(path)
    assert dataset._index is not None
    (file,) = cache.glob("*.index1")
    assert dataset._index.name == str(file)
    assert dataset._readers == {}
    same_rows(path, 10, draws)
    assert verify(path).ok


@pytest.mark.parametrize("name", ["v1", "v2", "sampled"])
def test_golden_dumps_are_indexed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "dump"
    shutil.copytree(Path(__file__).parent / "golden" / name, path)
    expected = [LogitDataset(path)[number] for number in range(4)]
    assert main(["index", str(path)]) == 0
    dataset = LogitDataset(path)
    assert dataset._index is not None
    for number, record in enumerate(expected):
        assert_same(dataset[number], record, tolerance=0)
    assert dataset._readers == {}
    assert verify(path).ok


@pytest.mark.parametrize("codec", ["v1", "v2"])
@pytest.mark.parametrize("indexed", [True, False])
def test_golden_dumps_with_an_index_are_read_for_ever(
    tmp_path: Path, codec: str, indexed: bool
) -> None:
    """golden/indexed_* hold heads and indexes of the first release that wrote them."""
    golden = Path(__file__).parent / "golden"
    path, expected = tmp_path / "dump", np.load(golden / "expected_indexed.npz")
    shutil.copytree(golden / f"indexed_{codec}", path)
    if not indexed:
        index_file(path).unlink()
    dataset = LogitDataset(path)
    assert dataset.lengths.tolist() == [20] * 4
    assert dataset.dump.partition(0).shards
    for number in (3, 0, 2, 1):
        names = ("counts", "ids", "logprobs", "tail_logprob")
        arrays = [expected[f"{name}_{number}"] for name in names]
        wanted = Record(f"doc-{number}", 0, expected[f"input_ids_{number}"], TopK(*arrays))
        record = dataset[number]
        assert_same(record, wanted, tolerance=1e-5)
        sampled = [expected[f"sampled_{name}_{number}"] for name in ("counts", "ids", "times")]
        assert record.topk.samples is not None
        assert record.topk.samples.same(Samples(5, *sampled))
    assert dataset._readers == {}
    assert verify(path).ok


@pytest.mark.parametrize("codec", ["v1", "v2"])
@pytest.mark.parametrize("indexed", [True, False])
def test_golden_dumps_with_masks_are_read_for_ever(
    tmp_path: Path, codec: str, indexed: bool
) -> None:
    """golden/masked_* hold masks as the first release with them wrote; v2 with samples, too."""
    golden = Path(__file__).parent / "golden"
    path, expected = tmp_path / "dump", np.load(golden / "expected_masked.npz")
    shutil.copytree(golden / f"masked_{codec}", path)
    assert LogitDataset(path)._index is not None
    if not indexed:
        index_file(path).unlink()
        for file in path.glob("*/*.index"):
            file.unlink()
    for dataset in (LogitDataset(path), LogitDataset(path, partial=True)):
        for number in (3, 0, 2, 1):
            names = ("counts", "ids", "logprobs", "tail_logprob")
            topk = TopK(*(expected[f"{name}_{number}"] for name in names))
            targets, input_ids = expected[f"targets_{number}"], expected[f"input_ids_{number}"]
            record = dataset[number]
            assert record.targets is not None
            assert record.targets.tolist() == targets.tolist()
            wanted = Record(f"doc-{number}", 0, input_ids, topk, targets)
            assert_same(record, wanted, tolerance=1e-5)
            if codec == "v2":
                sampled = [expected[f"sampled_{name}_{number}"] for name in SAMPLED]
                assert record.topk.samples is not None
                assert record.topk.samples.same(Samples(5, *sampled))
        counts = [int(expected[f"targets_{number}"].sum()) for number in range(4)]
        assert dataset.target_counts.tolist() == counts
    assert verify(path).ok


@SHAPES
def test_the_command_writes_the_index(
    tmp_path: Path, cache: Path, codec: str, draws: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dump"
    make_dump(path, codec=codec, samples=draws)
    as_before(path)
    assert main(["index", counted(path)]) == 0
    assert "10 rows in" in capsys.readouterr().out
    assert main(["index", str(path)]) == 0
    assert f"{index_file(path).name} is there" in capsys.readouterr().out
    assert verify(path).ok
    assert not cache.exists()
    dataset = LogitDataset(counted(path))
    assert Counted.requests == {"GET": 3}
    dataset[3]
    assert Counted.requests == {"GET": 3 + 2 + (draws > 0)}
    assert_same(dataset[3], random_record(3, samples=draws))
    assert main(["index", str(tmp_path / "none")]) == 2
    create_dump(tmp_path / "open", plan())
    assert main(["index", str(tmp_path / "open")]) == 2


@pytest.mark.parametrize(("codec", "draws"), [("v1", 12), ("v2", 0)])
def test_masked_rows_are_indexed(tmp_path: Path, codec: str, draws: int) -> None:
    """By the writer, by the command, and by the first use of a dump whose heads are apart."""
    path, more = tmp_path / "dump", {"codec": codec, "samples": draws, "targets": TARGETS}
    make_dump(path, **more)
    written = index_file(path).read_bytes()
    counts = LogitDataset(path).target_counts.tolist()
    index_file(path).unlink()
    for file in path.glob("*/*.index"):
        file.unlink()
    assert main(["index", str(path)]) == 0
    assert index_file(path).read_bytes() == written
    as_before(path)
    dataset = LogitDataset(path)
    assert dataset.target_counts.tolist() == counts
    for number in (7, 0, 3):
        assert_same(dataset[number], masked_record(number, samples=draws))
    assert dataset._readers == {}
    assert verify(path).ok


def test_an_index_beside_a_shard_without_its_targets_is_not_joined(tmp_path: Path) -> None:
    """As a hostile writer leaves it in a dump that is not finished; the shard says it all."""
    make_dump(tmp_path / "dump", shards=2, targets=TARGETS)
    path = tmp_path / "dump"
    (file,) = path.glob("00000/00001-*.index")
    data = bytearray(file.read_bytes())
    at = HEADER.size + SHARD.itemsize + 4 * 5
    data[12] -= 4
    file.write_bytes(seal_index(bytes(data[:at] + data[at + 20 :])))
    (path / "manifest.json").unlink()
    index_file(path).unlink()
    Dump(path).finish()
    assert not list(path.glob("rows-*.index"))
    assert main(["index", str(path)]) == 0
    assert len(LogitDataset(path).target_counts) == 10
    (fault,) = verify(path).faults
    assert fault.startswith(f"00000/{file.name}: without targets, the plan is with targets")


def test_a_dump_of_two_releases_is_indexed_whole(tmp_path: Path) -> None:
    """One shard with heads and an index beside it, one of before; then both in one index."""
    path = tmp_path / "dump"
    make_dump(path)
    as_before(path)
    for name in ("manifest.json", "00000/complete.json"):
        (path / name).unlink()
    dump = create_dump(path, plan())
    writer = ShardWriter(dump.partition(0))
    for number in range(10, 13):
        writer.write(random_record(number))
    writer.commit({})
    dump.partition(0).finish({})
    dump.finish()
    assert not list(path.glob("*.index"))
    same_rows(path, 13)
    assert main(["index", str(path)]) == 0
    same_rows(path, 13)
    assert verify(path).ok


def test_another_writers_compressed_rows_have_no_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dump(tmp_path / "dump", shards=1)
    rewrite(tmp_path / "dump")
    same_rows(tmp_path / "dump", 5)
    assert LogitDataset(tmp_path / "dump")._index is None
    assert main(["index", str(tmp_path / "dump")]) == 2
    assert "parquet: the column payload is compressed" in capsys.readouterr().err


def test_a_damaged_or_later_index_in_the_dump_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dump(tmp_path)
    file = index_file(tmp_path)
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(CorruptIndex, match=rf"{file.name}: .*remove the file.*storage index"):
        LogitDataset(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 4
    assert main(["index", str(tmp_path)]) == 4
    (fault,) = verify(tmp_path).faults
    assert file.name in fault
    file.write_bytes(good[:8] + b"\x09" + good[9:])
    with pytest.raises(FormatVersionError, match=r"index of version 9.*update mol-distill"):
        LogitDataset(tmp_path)
    file.unlink()
    assert main(["index", str(tmp_path)]) == 0
    assert file.read_bytes() == good
    capsys.readouterr()


def test_verify_compares_the_index_with_the_shards(tmp_path: Path) -> None:
    """Checksums right, two rows exchanged; or a head that says other than the columns."""
    make_dump(tmp_path)
    file = index_file(tmp_path)
    good = file.read_bytes()
    place = good.rindex(good[-12:])
    file.write_bytes(seal_index(good[: place - 12] + good[place:] + good[place - 12 : place]))
    (fault,) = verify(tmp_path).faults
    assert fault == (
        f"{file.name}: other places than the rows of "
        f"00000/{data_file(tmp_path, '00000/00001').name} have"
    )


def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "dump"
    make_dump(path)
    as_before(path)
    same_rows(path, 10)
    (file,) = cache.glob("*.index1")
    good = file.read_bytes()
    file.write_bytes(good[:100])
    assert LogitDataset(path)._index is None
    assert not file.exists()
    same_rows(path, 10)
    assert file.read_bytes() == good


def test_one_process_makes_the_index_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "dump", tmp_path / "log"
    make_dump(path)
    as_before(path)
    scan_file = scanning.scan_file

    def logged(dump: Dump, shard: Shard) -> Part:
        with log.open("a") as file:
            file.write(f"{shard.name}\n")
        return scan_file(dump, shard)

    monkeypatch.setattr(scanning, "scan_file", logged)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(tokens_of, [path] * 3, chunksize=1)
    assert found == [200] * 3
    assert log.read_text().split() == ["00000/00000", "00000/00001"]


def tokens_of(path: Path) -> int:
    return int(LogitDataset(path).lengths.sum())


def test_without_a_cache_the_index_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dump"
    make_dump(path)
    as_before(path)
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MOL_CACHE", str(tmp_path / "file" / "below"))
    same_rows(path, 10)
    assert (tmp_path / "file").read_text() == "x"


def test_a_remote_index_is_fetched_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dump(tmp_path / "dump")
    for requests in (3, 2):
        LogitDataset(counted(tmp_path / "dump")).lengths  # noqa: B018
        assert Counted.requests == {"GET": requests}
    monkeypatch.setenv("MOL_CACHE", str(tmp_path / "other"))
    same_rows(counted(tmp_path / "dump"), 10)
    assert Counted.requests == {"GET": 3 + 2 + 10}, "plan, manifest, index; tables and rows"
    assert len(list((tmp_path / "other").glob("*.rows"))) == 2


def test_gc_knows_indexes(tmp_path: Path) -> None:
    make_dump(tmp_path)
    assert leftovers(tmp_path, -1) == []
    old = [tmp_path / f"rows-{'0' * 16}.index", tmp_path / "00000/00001-feedbeef0123.index"]
    foreign = [tmp_path / "rows-of-mine.index", tmp_path / "00000/my.index"]
    for file in [*old, *foreign]:
        file.write_bytes(b"x")
        os.utime(file, (0, 0))
    found = leftovers(tmp_path)
    assert {leftover.name for leftover in found} == {str(f.relative_to(tmp_path)) for f in old}
    notes = verify(tmp_path).notes
    assert len(notes) == 2
    assert all(any(file.name in note for note in notes) for file in old)
