"""ShardWriter: what it refuses, and when its rows become visible."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage import (
    FormatVersionError,
    IncompleteDump,
    InvalidRecord,
    LogitDataset,
    Record,
    ShardWriter,
    create_dump,
    verify,
)
from tests.helpers.forged import strip
from tests.helpers.records import make_dump, plan, random_record

CODECS = pytest.mark.parametrize("codec", ["v1", "v2"])
DRAWS = 12


@CODECS
def test_a_shard_without_rows(tmp_path: Path, codec: str) -> None:
    make_dump(tmp_path, shards=1, rows=0, codec=codec)
    assert len(LogitDataset(tmp_path)) == 0
    assert verify(tmp_path).ok


def test_a_codec_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatVersionError, match="codec is 'v3'"):
        make_dump(tmp_path, codec="v3")


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


def test_the_plan_says_whether_there_are_samples(tmp_path: Path) -> None:
    writer = ShardWriter(create_dump(tmp_path / "a", plan(samples=DRAWS)).partition(0))
    with pytest.raises(InvalidRecord, match="document 'doc-1', chunk 0: 0 draws"):
        writer.write(random_record(1))
    with pytest.raises(InvalidRecord, match="5 draws, the plan has samples: 12"):
        writer.write(random_record(1, samples=5))
    writer = ShardWriter(create_dump(tmp_path / "b", plan()).partition(0))
    with pytest.raises(InvalidRecord, match="12 draws, the plan has samples: 0"):
        writer.write(random_record(1, samples=DRAWS))


def test_the_exact_part_is_the_same_with_samples_or_without(tmp_path: Path) -> None:
    payloads = []
    for name, samples in [("with", DRAWS), ("without", 0)]:
        dump = make_dump(tmp_path / name, shards=1, samples=samples)
        table = pq.read_table(tmp_path / name / dump.shards()[0].file)
        payloads.append([strip(payload) for payload in table.column("payload").to_pylist()])
    assert payloads[0] == payloads[1]
