"""Where a partition is resumed."""

from pathlib import Path

import pytest

from pipeline.dump.partitions import what_is_missing
from storage import CorruptShard, Dump, ShardWriter, create_dump
from tests.helpers.records import plan, random_record


def half_done(path: Path, *cursors: dict) -> Dump:
    """A dump of 40 documents in two partitions, with shards of the second one."""
    dump = create_dump(path, plan(partitions=2))
    for number, cursor in enumerate(cursors):
        writer = ShardWriter(dump.partition(1), number)
        writer.write(random_record(number))
        writer.commit(cursor, stats={"documents": 1})
    return dump


def test_the_last_cursor_says_where(tmp_path: Path) -> None:
    dump = half_done(tmp_path, {"document": 25}, {"document": 40})
    span = what_is_missing(dump.partition(1), 40)
    assert (span.first, span.next, span.stop, span.shard) == (20, 40, 40, 2)
    assert what_is_missing(dump.partition(0), 40).next == 0


@pytest.mark.parametrize(
    "cursors",
    [
        [{"document": 19}],
        [{"document": 41}],
        [{"document": 30}, {"document": 25}],
        [{"document": 10**9}],
        [{}],
    ],
)
def test_a_cursor_outside_the_partition_is_named(tmp_path: Path, cursors: list) -> None:
    dump = half_done(tmp_path, *cursors)
    with pytest.raises(CorruptShard, match=rf"00001/0000{len(cursors) - 1}\.json: document: expec"):
        what_is_missing(dump.partition(1), 40)
