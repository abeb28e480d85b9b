"""The tables that shards share: found by their hash, checked, read once."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from storage import (
    CorruptShard,
    Dump,
    FormatVersionError,
    LogitDataset,
    Record,
    StorageError,
    StoreError,
    TopK,
    row_reader,
    shard,
    shard_reader,
    verify,
)
from storage.__main__ import main
from storage.codec.codec import quantised
from storage.codec.v3_learning import learn
from storage.codec.v3_tables import Tables
from storage.dump_tables import DumpTables, tables_file
from storage.store import Store
from tests.helpers.forged import read_json, rewrite, seal
from tests.helpers.linked import Counted, counted
from tests.helpers.records import VOCAB, assert_same, make_dump, random_record

STEP = 1 / 2048


def some_tables(rows: int = 3, vocab_size: int = VOCAB) -> Tables:
    records = [random_record(number) for number in range(rows)]
    grids = [quantised(record.topk, vocab_size, STEP, "v3") for record in records]
    pairs = [(r.input_ids, grid) for r, grid in zip(records, grids, strict=True)]
    return learn(pairs, vocab_size)  # type: ignore[arg-type]


def tables_of(path: Path) -> Path:
    """The only tables of a dump."""
    (file,) = path.glob("tables-*.bin")
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "dump"
    make_dump(folder, shards=2, rows=3, codec="v3")
    return folder


@pytest.fixture
def dump(made: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(made, tmp_path / "dump"))


def test_published_tables_have_the_name_of_their_hash(tmp_path: Path) -> None:
    tables, found = DumpTables(Store(tmp_path), VOCAB), some_tables()
    sha256 = tables.publish(found)
    file = tmp_path / tables_file(sha256)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256
    before = file.stat()
    assert tables.publish(found) == DumpTables(Store(tmp_path), VOCAB).publish(found) == sha256
    assert file.stat() == before, "created once"
    for other in (tables, DumpTables(Store(tmp_path), VOCAB), pickle.loads(pickle.dumps(tables))):
        assert other.get(sha256).checksum == found.checksum
    assert tables.newest(8) == tables.recent == [sha256]


def test_another_file_of_that_name_is_not_taken_for_the_tables(tmp_path: Path) -> None:
    found = some_tables()
    name = tables_file(hashlib.sha256(found.pack()).hexdigest())
    (tmp_path / name).write_bytes(b"other")
    with pytest.raises(CorruptShard, match=rf"{name}: the sha256 is .* restore it"):
        DumpTables(Store(tmp_path), VOCAB).publish(found)
    assert (tmp_path / name).read_bytes() == b"other"


def test_the_newest_come_first_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    tables = DumpTables(Store(tmp_path), VOCAB)
    made = [tables.publish(some_tables(rows)) for rows in (1, 2, 3)]
    for age, sha256 in enumerate(made):
        os.utime(tmp_path / tables_file(sha256), (1e9 - age, 1e9 - age))
    (tmp_path / "tables-0123456789abcdef.bin").write_bytes(b"x")
    (tmp_path / "tables-fedcba9876543210.bin").symlink_to(tmp_path / "tables-0123456789abcdef.bin")
    (tmp_path / "tables-notes.bin").write_bytes(b"x")
    assert DumpTables(Store(tmp_path), VOCAB).newest(9) == made
    assert len(DumpTables(Store(tmp_path), VOCAB).newest(3)) < 3


def test_all_rows_of_a_dump_read_its_tables_once(dump: Path) -> None:
    dataset = LogitDataset(counted(dump))
    Counted.reset()
    for index in (5, 0, 3, 2, 4, 1):
        assert_same(dataset[index], random_record(index))
    assert Counted.requests == {"GET": 6 + 1}
    for index, record in enumerate(LogitDataset(counted(dump), partial=True)):
        assert_same(record, random_record(index))


def test_tables_in_memory_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = some_tables()
    monkeypatch.setattr("storage.dump_tables.KEPT_BYTES", 2 * found.nbytes + 100)
    tables = DumpTables(Store(tmp_path), VOCAB)
    for rows in (1, 2, 3, 4):
        tables.publish(some_tables(rows))
    assert tables._kept.total <= tables._kept.most
    assert len(tables.recent) < 4


def test_a_cache_keeps_them_whole(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOL_CACHE", str(tmp_path / "cache"))
    LogitDataset(counted(dump)).read(range(6))
    (kept,) = (tmp_path / "cache").glob("*.tables")
    assert kept.read_bytes() == tables_of(dump).read_bytes()
    Counted.reset()
    LogitDataset(counted(dump)).read(range(6))
    assert Counted.requests["GET"] == 2, "plan and manifest"
    kept.write_bytes(bytes(len(kept.read_bytes())))
    assert_same(LogitDataset(counted(dump))[0], random_record(0))
    assert Counted.requests["GET"] == 3
    LogitDataset(counted(dump))[0]
    assert kept.read_bytes() == tables_of(dump).read_bytes(), "kept anew"


FAULTS = ["missing", "changed", "cut", "larger", "link", "folder"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", ["local", "remote"])
def test_tables_that_are_not_the_markers_are_named(
    dump: Path, tmp_path: Path, fault: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.store.PATIENCE", 0.01)
    monkeypatch.setattr("storage.dump_tables.MOST_BYTES", 1 << 20)
    file, good = tables_of(dump), tables_of(dump).read_bytes()
    file.unlink()
    if fault == "link":
        (tmp_path / "elsewhere").write_bytes(good)
        file.symlink_to(tmp_path / "elsewhere")
        if place == "remote":
            return  # a store of links is the store's own business
    elif fault == "folder":
        file.mkdir()
    elif fault != "missing":
        changed = {"changed": good[:-1] + b"\0", "cut": good[:9], "larger": good + bytes(1 << 20)}
        file.write_bytes(changed[fault])
    path = str(dump) if place == "local" else counted(dump)
    kinds = (CorruptShard, StoreError) if fault == "folder" else CorruptShard
    with pytest.raises(kinds, match=file.name):
        LogitDataset(path)[4]
    if fault == "folder" and place == "remote":
        return
    with pytest.raises(CorruptShard, match=file.name):
        list(LogitDataset(path))
    (found,) = verify(path).faults
    assert file.name in found
    assert "2 shards need it, 00000/00000-" in found
    assert main(["verify", path]) == 4


def test_forged_tables_are_refused(dump: Path) -> None:
    """The right hash everywhere, of tables that are not those of the rows."""
    first = Dump(dump).shards()[0].tables
    for number, (tables, message) in enumerate(
        [
            (some_tables(5).pack(), "the payload needs"),
            (some_tables(5, 4 * VOCAB).pack(), "a vocabulary of 1200 ids, the plan says 300"),
            (b"", "0 bytes that start with"),
        ]
    ):
        sha256 = hashlib.sha256(tables).hexdigest()
        (dump / tables_file(sha256)).write_bytes(tables)
        rewrite(dump, None, {b"tables": sha256.encode()})
        seal(dump, marker={"tables": sha256})
        with pytest.raises(StorageError, match=rf"00000/00000-.*, row 0 .*{message}"):
            LogitDataset(dump, partial=True)[0]
        assert number < 3
    seal(dump, marker={"tables": first})
    with pytest.raises(CorruptShard, match=r"its tables are b'.*', the marker says"):
        LogitDataset(dump, partial=True)[0]


@pytest.mark.parametrize("value", [None, 7, "", "../../etc/passwd", "A" * 64, "a" * 63])
def test_a_marker_names_tables_by_their_hash(dump: Path, value: object) -> None:
    seal(dump, marker={"tables": value})
    with pytest.raises(CorruptShard, match=r"tables: expected a name such as 64 hexadecimal"):
        LogitDataset(dump)[0]


def test_other_codecs_take_no_notice(tmp_path: Path) -> None:
    make_dump(tmp_path, shards=1, rows=2)
    seal(tmp_path, marker={"tables": "../../etc/passwd"})
    assert_same(LogitDataset(tmp_path)[1], random_record(1))
    assert verify(tmp_path).ok
    assert "tables" not in read_json(tmp_path / "plan.json")


def test_tables_that_no_marker_names(dump: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """verify notes them; gc removes them of a finished dump, once they are old."""
    extra = dump / tables_file(DumpTables(Store(dump), VOCAB).publish(some_tables(7)))
    used = next(file for file in dump.glob("tables-*.bin") if file != extra)
    (note,) = verify(dump).notes
    assert note == f"{extra.name}: no marker names these tables; never read"
    manifest = (dump / "manifest.json").read_bytes()
    (dump / "manifest.json").unlink()
    gc = ["gc", str(dump), "--delete", "--older-than=-1"]
    assert main(gc) == 0
    assert extra.exists(), "an unfinished dump may still name them"
    (dump / "manifest.json").write_bytes(manifest)
    assert main(["gc", str(dump), "--delete"]) == 0
    assert extra.exists(), "too young"
    assert main(gc) == 0
    assert (extra.exists(), used.exists()) == (False, True)
    assert "1 leftovers" in capsys.readouterr().out
    assert verify(dump).notes == []


def test_inspect_shows_them(dump: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    file = tables_of(dump)
    size = f"{file.stat().st_size:,} bytes"
    assert main(["inspect", str(dump)]) == 0
    shown = capsys.readouterr().out
    assert f"tables     {size} more, in 1 files\n" in shown
    assert f"{file.name} {size}, 2 shards, the first is 00000/00000\n" in shown
    file.unlink()
    main(["inspect", str(dump)])
    assert f"{file.name} missing, 2 shards" in capsys.readouterr().out


def test_an_index_needs_no_tables(dump: Path) -> None:
    next(dump.glob("rows-*.index")).unlink()
    for file in dump.glob("00000/*.index"):
        file.unlink()
    assert main(["index", str(dump)]) == 0
    for index in np.random.default_rng(0).permutation(6).tolist():
        assert_same(LogitDataset(dump)[index], random_record(index))
    assert verify(dump).ok


@pytest.mark.parametrize("name", ["v3", "masked_v3"])
@pytest.mark.parametrize("partial", [False, True])
def test_golden_dumps_of_version_3_are_read_for_ever(name: str, partial: bool) -> None:
    """golden/*v3 hold a dump as the first release of version 3 wrote it: two partitions that share
    tables; one has masks and samples, too."""
    golden = Path(__file__).parent / "golden"
    dataset = LogitDataset(golden / name, partial=partial)
    expected = np.load(golden / "expected_v3.npz")
    assert len(dataset) == 4
    assert len({shard.tables for shard in dataset.shards}) == 1
    for number in (3, 0, 2, 1):
        found = dataset[number]
        fields = ("counts", "ids", "logprobs", "tail_logprob")
        topk = TopK(*(expected[f"{name}_{field}_{number}"] for field in fields))
        targets = expected[f"{name}_targets_{number}"] if found.targets is not None else None
        input_ids = expected[f"{name}_input_ids_{number}"]
        wanted = Record(f"doc-{number}", 0, input_ids, topk, targets)
        assert_same(found, wanted, tolerance=1e-5)
        samples = found.topk.samples
        assert (samples is None) == (name == "v3")
        if samples is not None:
            drawn = np.stack([samples.ids, samples.times])
            np.testing.assert_array_equal(drawn, expected[f"{name}_sampled_{number}"])
    assert verify(golden / name).ok


@pytest.mark.parametrize("partial", [False, True])
def test_a_release_before_version_3_refuses_it_by_name(
    partial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (shard, shard_reader, row_reader):
        monkeypatch.setattr(module, "FORMATS", {b"mol-topk/1": "v1", b"mol-topk/2": "v2"})
    with pytest.raises(FormatVersionError, match=r"('v3'|b'mol-topk/3').*; update mol-distill"):
        LogitDataset(Path(__file__).parent / "golden" / "v3", partial=partial)[0]
