"""An export appears whole, and never in place of what it reads."""

from pathlib import Path

import pytest

from storage import CorruptShard, LogitDataset
from storage.__main__ import main
from storage.export import export
from tests.helpers.forged import first_is, rewrite
from tests.helpers.records import make_dump


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


def test_a_target_inside_the_dump_is_refused(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", shards=1, rows=3)
    before = (tmp_path / "dump/plan.json").read_bytes()
    assert main(["export", str(tmp_path / "dump"), str(tmp_path / "dump/plan.json")]) == 2
    assert (tmp_path / "dump/plan.json").read_bytes() == before
