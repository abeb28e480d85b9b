"""An export appears whole, and never in place of what it reads."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import CorruptShard, LogitDataset
from storage.__main__ import main
from storage.export import export
from tests.helpers.forged import first_is, rewrite
from tests.helpers.records import TARGETS, flip_byte, make_dump


def test_a_failed_export_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", shards=1, rows=3)
    rewrite(tmp_path / "dump", first_is("payload", b""))
    target = tmp_path / "out" / "rows.parquet"
    target.parent.mkdir()
    target.write_text("before")
    with pytest.raises(CorruptShard):
        export(LogitDataset(tmp_path / "dump"), target)
    assert [file.name for file in target.parent.iterdir()] == [target.name]
    assert target.read_text() == "before"


CHANGES = [{}, {"samples": 5}, {"targets": TARGETS}]


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("per", ["position", "sequence"])
@pytest.mark.parametrize("changes", CHANGES)
def test_several_files_hold_the_rows_of_one(
    tmp_path: Path, changes: dict[str, Any], per: str, jobs: int
) -> None:
    make_dump(tmp_path / "dump", shards=3, rows=3, partitions=2, **changes)
    dataset = LogitDataset(tmp_path / "dump")
    written = export(dataset, tmp_path / "rows.parquet", per)
    assert export(dataset, f"{tmp_path}/rows/", per, jobs) == written
    files = sorted((tmp_path / "rows").iterdir())
    names = [f"0000{partition}-0000{shard}.parquet" for partition in (0, 1) for shard in range(3)]
    assert [file.name for file in files] == names
    whole = pq.read_table(tmp_path / "rows.parquet")
    assert pa.concat_tables([pq.read_table(file) for file in files]).equals(whole)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_export_of_several_files_leaves_none(tmp_path: Path, jobs: int) -> None:
    dump = make_dump(tmp_path / "dump", shards=3, rows=3)
    flip_byte(tmp_path / "dump" / dump.shards()[2].file)
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptShard, match=dump.shards()[2].file):
        export(LogitDataset(tmp_path / "dump"), f"{tmp_path}/out/rows/", jobs=jobs)
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "dump" / dump.shards()[1].file).unlink()
    with pytest.raises(CorruptShard, match=f"{dump.shards()[1].file}: the data file is missing"):
        export(LogitDataset(tmp_path / "dump"), f"{tmp_path}/out/rows/", jobs=jobs)


def test_a_folder_with_files_is_refused(tmp_path: Path, capsys: Any) -> None:
    """Readers of the folder would take them for rows of the dump."""
    make_dump(tmp_path / "dump", shards=2, rows=3)
    folder = tmp_path / "rows"
    folder.mkdir()
    assert main(["export", str(tmp_path / "dump"), str(folder)]) == 0, "an empty one is filled"
    assert len(list(folder.iterdir())) == 2
    assert main(["export", str(tmp_path / "dump"), str(folder)]) == 2
    assert "is not empty: choose a new folder" in capsys.readouterr().err
    assert len(list(folder.iterdir())) == 2
    file = str(tmp_path / "rows.parquet")
    assert main(["export", str(tmp_path / "dump"), file, "--jobs", "2"]) == 2
    assert "one process writes the one file" in capsys.readouterr().err


def test_a_target_inside_the_dump_is_refused(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", shards=1, rows=3)
    before = (tmp_path / "dump/plan.json").read_bytes()
    assert main(["export", str(tmp_path / "dump"), str(tmp_path / "dump/plan.json")]) == 2
    assert (tmp_path / "dump/plan.json").read_bytes() == before
