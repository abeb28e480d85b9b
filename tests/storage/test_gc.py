"""gc removes the files of dead writers, and nothing that anyone may still need."""

import os
import time
from pathlib import Path

from storage import ShardWriter, create_dump, verify
from storage.__main__ import main
from tests.helpers.records import TARGETS, make_dump, plan, random_record

DATA = "00000/00001-feedbeef0123.parquet"  # names that our writers give
WRITING = f"00000/.writing-00000-00001-{'0' * 32}"


def age(path: Path, hours: float) -> None:
    when = time.time() - 3600 * hours
    os.utime(path, (when, when))


def test_old_leftovers_go_and_the_rest_stays(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    dump = make_dump(tmp_path)
    committed = [tmp_path / shard.file for shard in dump.shards()]
    folder = tmp_path / "00000"
    old = [DATA, WRITING, ".creating-abcd_123", "00000/.creating-abcd_123"]
    old = [tmp_path / name for name in old]
    young = [folder / "00001-abcdef123456.parquet", folder / f".writing-00000-00002-{'a' * 32}"]
    foreign = [folder / "notes.txt", tmp_path / "other.parquet", folder / "00001-feed.parquet"]
    foreign += [folder / ".writing-thesis", folder / ".creating-a-new-world"]
    for path in [*old, *young, *foreign]:
        path.write_bytes(b"x" * 7)
    for path in [*committed, *old, *foreign, tmp_path / "plan.json"]:
        age(path, 30)
    assert main(["gc", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(path.name in shown for path in old)
    assert "4 leftovers, 28 bytes" in shown
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
    shards = dump.shards()
    (tmp_path / f"{shards[1].name}.json").unlink()
    main(["gc", str(tmp_path), "--delete", "--older-than=-1"])
    assert all((tmp_path / shard.file).exists() for shard in shards)
    (tmp_path / "manifest.json").unlink()
    main(["gc", str(tmp_path), "--delete", "--older-than=-1"])
    assert [(tmp_path / shard.file).exists() for shard in shards] == [True, False, True]


def test_links_are_never_followed_or_removed(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    dump = tmp_path / "dump"
    make_dump(dump)
    elsewhere = tmp_path / "elsewhere"
    for name in (DATA, WRITING):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_text("precious")
    (dump / "00001").symlink_to(elsewhere / "00000")
    (dump / "link").symlink_to(elsewhere)
    (dump / "loop").symlink_to(dump)
    (dump / DATA).symlink_to(elsewhere / DATA)
    assert main(["gc", str(dump), "--delete", "--older-than=-1"]) == 0
    assert "0 leftovers" in capsys.readouterr().out
    assert all((elsewhere / name).read_text() == "precious" for name in (DATA, WRITING))
    assert (dump / DATA).is_symlink()


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


def test_the_files_of_masked_rows_are_kept(tmp_path: Path) -> None:
    make_dump(tmp_path, targets=TARGETS)
    there = sorted(tmp_path.rglob("*"))
    assert main(["gc", str(tmp_path), "--delete", "--older-than=-1"]) == 0
    assert sorted(tmp_path.rglob("*")) == there
