"""gc removes the files of dead writers, and nothing that anyone may still need."""

import os
import time
from pathlib import Path

from storage import ShardWriter, create_dump, verify
from storage.__main__ import main
from tests.helpers.records import make_dump, plan, random_record


def age(path: Path, hours: float) -> None:
    when = time.time() - 3600 * hours
    os.utime(path, (when, when))


def test_old_leftovers_go_and_the_rest_stays(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    dump = make_dump(tmp_path)
    committed = [tmp_path / shard.file for shard in dump.shards()]
    folder = tmp_path / "00000"
    old = [folder / "00001-feedbeef.parquet", folder / ".writing-x", tmp_path / ".creating-y"]
    young = [folder / "00001-abcdef12.parquet", folder / ".writing-live"]
    foreign = [folder / "notes.txt", tmp_path / "other.parquet"]
    for path in [*old, *young, *foreign]:
        path.write_bytes(b"x" * 7)
    for path in [*committed, *old, *foreign, tmp_path / "plan.json"]:
        age(path, 30)
    assert main(["gc", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(path.name in shown for path in old)
    assert "3 leftovers, 21 bytes" in shown
    assert all(path.exists() for path in old), "a dry run removes nothing"
    assert main(["gc", str(tmp_path), "--delete"]) == 0
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in [*committed, *young, *foreign])
    assert verify(tmp_path).ok
    assert main(["gc", str(tmp_path), "--delete", "--older-than", "0"]) == 0
    assert not any(path.exists() for path in young)
    assert verify(tmp_path).ok


def test_a_shard_behind_a_lost_marker_is_kept(tmp_path: Path) -> None:
    dump = make_dump(tmp_path, shards=3)
    first, second, third = dump.shards()
    (tmp_path / f"{second.name}.json").unlink()
    main(["gc", str(tmp_path), "--delete", "--older-than=-1"])
    assert (tmp_path / first.file).exists()
    assert (tmp_path / third.file).exists()


def test_a_marker_that_cannot_be_read_stops_it(tmp_path: Path) -> None:
    dump = make_dump(tmp_path)
    (tmp_path / f"{dump.shards()[0].name}.json").write_text("{")
    assert main(["gc", str(tmp_path), "--delete", "--older-than=-1"]) == 4
    assert len(list((tmp_path / "00000").glob("*.parquet"))) == 2
    assert main(["gc", str(tmp_path / "none")]) == 2


def test_it_runs_beside_an_open_writer(tmp_path: Path) -> None:
    """The default age limit spares a shard that is being written."""
    dump = create_dump(tmp_path, plan())
    writer = ShardWriter(dump.partition(0))
    writer.write(random_record(0))
    writer.flush()
    assert main(["gc", str(tmp_path), "--delete"]) == 0
    writer.commit({})
    assert verify(tmp_path, partial=True).rows == 1
