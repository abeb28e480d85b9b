"""ShardWriter: what it refuses, and when its rows become visible."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from tests.helpers.records import (
    TARGETS,
    assert_same,
    make_dump,
    masked_record,
    plan,
    random_mask,
    random_record,
)

CODECS = pytest.mark.parametrize("codec", ["v1", "v2", "v3"])
DRAWS = 12


@CODECS
def test_a_shard_without_rows(tmp_path: Path, codec: str) -> None:
    make_dump(tmp_path, shards=1, rows=0, codec=codec)
    assert len(LogitDataset(tmp_path)) == 0
    assert verify(tmp_path).ok


def test_a_codec_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatVersionError, match="codec is 'v4'"):
        make_dump(tmp_path, codec="v4")


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


masks = st.lists(st.booleans(), min_size=2, max_size=40).filter(lambda mask: any(mask[1:]))


@given(
    st.lists(masks, min_size=1, max_size=4),
    st.sampled_from(["v1", "v2", "v3"]),
    st.sampled_from([0, 3]),
)
@settings(deadline=None, max_examples=40)
def test_any_mask_comes_back(given: list[list[bool]], codec: str, samples: int) -> None:
    """With and without the index; the mark of the first token has no meaning."""
    records = [
        random_record(number, len(mask), samples=samples, targets=np.array(mask))
        for number, mask in enumerate(given)
    ]
    with tempfile.TemporaryDirectory() as folder:
        dump = create_dump(folder, plan(codec=codec, samples=samples, targets=TARGETS))
        writer = ShardWriter(dump.partition(0))
        for record in records:
            writer.write(record)
        marker = writer.commit({})
        dump.partition(0).finish({})
        dump.finish()
        assert marker["positions"] == sum(sum(mask[1:]) for mask in given)
        for dataset in (LogitDataset(folder), LogitDataset(folder, partial=True)):
            for number, mask in enumerate(given):
                found = dataset[number]
                assert found.targets is not None
                assert found.targets.tolist() == [False, *mask[1:]]
                assert_same(found, records[number])
                if samples:
                    assert found.topk.samples is not None
                    assert found.topk.samples.same(records[number].topk.samples)  # type: ignore[arg-type]
        assert verify(folder).ok


@CODECS
def test_a_record_without_a_mask_is_learnt_whole(tmp_path: Path, codec: str) -> None:
    dump = create_dump(tmp_path, plan(codec=codec, targets=TARGETS))
    writer = ShardWriter(dump.partition(0))
    writer.write(random_record(0))
    writer.commit({})
    (record,) = LogitDataset(tmp_path, partial=True)
    assert record.targets is not None
    assert record.targets.tolist() == [False] + 19 * [True]
    assert_same(replace(record, targets=None), random_record(0))


@pytest.mark.parametrize(
    ("targets", "positions", "message"),
    [
        (np.ones(19, bool), 18, r"expected targets bool \[20\], .* found bool \[19\]"),
        (np.ones((20, 1), bool), 19, r".* found bool \[20, 1\]"),
        (np.ones(20, int), 19, r".* found int64 \[20\]"),
        (np.zeros(20, bool), 0, "expected a target among the tokens after the first, found none"),
        (np.arange(20) < 1, 0, "expected a target among the tokens after the first, found none"),
        (random_mask(20), 19, "20 tokens, 8 of them targets, need 8 distributions, found 19"),
        (random_mask(20), 7, "20 tokens, 8 of them targets, need 8 distributions, found 7"),
        (None, 8, "20 tokens, 19 of them targets, need 19 distributions, found 8"),
    ],
)
def test_masks_that_cannot_be_stored_name_the_document(
    tmp_path: Path, targets: np.ndarray | None, positions: int, message: str
) -> None:
    writer = ShardWriter(create_dump(tmp_path, plan(targets=TARGETS)).partition(0))
    record = random_record(5)
    topk = random_record(1, tokens=positions + 1).topk
    with pytest.raises(InvalidRecord, match=f"document 'doc-5', chunk 0: {message}"):
        writer.write(replace(record, topk=topk, targets=targets))
    assert (writer.sums.rows, writer.sums.tokens, writer.pending) == (0, 0, [])


def test_rows_without_a_target_or_a_token_are_refused(tmp_path: Path) -> None:
    masked = ShardWriter(create_dump(tmp_path / "a", plan(targets=TARGETS)).partition(0))
    with pytest.raises(InvalidRecord, match="after the first, found none"):
        masked.write(random_record(0, tokens=1))
    plain = ShardWriter(create_dump(tmp_path / "b", plan()).partition(0))
    empty = replace(random_record(0, tokens=1), input_ids=np.zeros(0, np.int32))
    for writer in (masked, plain):
        with pytest.raises(InvalidRecord, match="document 'doc-0', chunk 0: no tokens"):
            writer.write(empty)
    plain.write(random_record(0, tokens=1))


def test_a_mask_needs_a_plan_with_targets(tmp_path: Path) -> None:
    writer = ShardWriter(create_dump(tmp_path, plan()).partition(0))
    with pytest.raises(InvalidRecord, match=r"'doc-1', chunk 0: a mask .* plan has no `targets`"):
        writer.write(masked_record(1))


def test_learnt_tokens_fill_shards_and_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions, where there are masks; of very sparse rows, a 64th of their tokens."""
    monkeypatch.setattr("storage.shard_writer.ROW_GROUP_TOKENS", 20)
    plain = ShardWriter(create_dump(tmp_path / "a", plan()).partition(0))
    plain.write(random_record(0))
    assert (plain.learnt, plain.file.rows) == (20, 1)
    writer = ShardWriter(create_dump(tmp_path / "b", plan(targets=TARGETS)).partition(0))
    sparse = np.arange(20) == 7
    for number in range(1, 20):
        writer.write(random_record(number, targets=sparse))
        assert (writer.learnt, writer.file) == (number, None)
    writer.write(random_record(20, targets=sparse))
    assert (writer.learnt, writer.file.rows) == (20, 20)
    writer.write(random_record(21, tokens=64 * 50, targets=np.arange(64 * 50) == 7))
    assert (writer.learnt, writer.file.rows) == ((20 * 20 + 64 * 50) // 64, 21)


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
