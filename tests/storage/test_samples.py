"""Samples of the tail: the record, its payload, shards that hold them, and damage."""

import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import (
    CorruptPayload,
    FormatVersionError,
    InvalidRecord,
    LogitDataset,
    Record,
    Samples,
    ShardWriter,
    StorageError,
    TopK,
    create_dump,
    verify,
)
from storage.__main__ import main
from storage.codec import samples as sampled
from storage.codec.frames import deflate, join
from storage.samples import fault
from storage.topk import check_topk
from tests.fuzz.corrupt_shard import corrupt
from tests.helpers.records import (
    VOCAB,
    make_dump,
    plan,
    random_record,
    random_topk,
    with_samples,
)

DRAWS = 12


def some(draws: int = DRAWS, positions: int = 30, k: int = 5) -> Samples:
    topk = with_samples(random_topk(positions, k), draws, seed=3)
    assert topk.samples is not None
    return topk.samples


@st.composite
def sampled_topks(draw: st.DrawFn) -> tuple[TopK, int]:
    vocab_size = draw(st.sampled_from([2, 3, 50, 257, 1 << 20]))
    small = min(vocab_size, 300)
    positions = draw(st.integers(0, 12))
    count = st.integers(0, small)
    counts = draw(st.lists(count, min_size=positions, max_size=positions) | count)
    topk = random_topk(positions, counts, small, draw(st.integers(0, 99)))
    made = with_samples(topk, draw(st.sampled_from([1, 2, 50, 300])), small, draw(st.integers(0)))
    stretch = (vocab_size - 1) // max(small - 1, 1)  # ids all over a large vocabulary
    assert made.samples is not None
    samples = replace(made.samples, ids=made.samples.ids * np.int32(stretch))
    return replace(made, ids=made.ids * np.int32(stretch), samples=samples), vocab_size


@given(sampled_topks())
@settings(deadline=None, max_examples=150)
def test_round_trip_is_exact(made: tuple[TopK, int]) -> None:
    topk, vocab_size = made
    check_topk(topk, vocab_size)
    assert topk.samples is not None
    data = sampled.pack(topk.samples, vocab_size)
    found = sampled.unpack(data)
    assert found.same(topk.samples)
    assert (found.counts.dtype, found.ids.dtype, found.times.dtype) == ("u2", "i4", "u2")
    assert sampled.pack(found, vocab_size) == data


def test_from_drawn_counts_each_id_of_each_position() -> None:
    found = Samples.from_drawn([[7, 2, 7, 7], [-1] * 4, [0, 0, 0, 0], [3, 2, 1, 0]])
    assert found.draws == 4
    assert found.counts.tolist() == [2, 0, 1, 4]
    assert found.ids.tolist() == [2, 7, 0, 0, 1, 2, 3]
    assert found.times.tolist() == [1, 3, 4, 1, 1, 1, 1]
    assert len(Samples.from_drawn(np.zeros((0, 4))).ids) == 0


@given(sampled_topks())
@settings(deadline=None)
def test_spreading_the_tail_moves_all_of_its_mass(made: tuple[TopK, int]) -> None:
    topk, _ = made
    spread, samples = topk.spread_tail(), topk.samples
    assert samples is not None
    assert np.isneginf(spread.tail_logprob).all()
    np.testing.assert_allclose(spread.kept_mass(), 1, atol=1e-5)
    ends = np.cumsum(spread.counts, dtype=np.int64)
    for at, (end, count) in enumerate(zip(ends, spread.counts, strict=True)):
        here = slice(end - count, end)
        kept, drawn = int(topk.counts[at]), int(samples.counts[at])
        before = int(topk.counts[:at].sum(dtype=np.int64)), int(samples.counts[:at].sum())
        expected = [*topk.ids[before[0] :][:kept], *samples.ids[before[1] :][:drawn]]
        assert spread.ids[here].tolist() == expected
        shares = samples.times[before[1] :][:drawn] / samples.draws
        tail = np.exp(float(topk.tail_logprob[at]))
        np.testing.assert_allclose(np.exp(spread.logprobs[here][kept:]), tail * shares, rtol=1e-4)


def test_spread_without_samples_is_itself_and_cutting_with_them_is_refused() -> None:
    topk = random_topk(4, 3)
    assert topk.spread_tail() is topk
    with pytest.raises(ValueError, match="cut before drawing"):
        with_samples(topk, 4).cut(min_prob=0.1)


def change(topk: TopK, **changes: object) -> TopK:
    assert topk.samples is not None
    return replace(topk, samples=replace(topk.samples, **changes))  # type: ignore[arg-type]


def wrong_records() -> list[tuple[TopK, str]]:
    topk = TopK(
        np.array([1, 1], np.uint16), np.array([4, 4], np.int32),
        np.array([-0.5, 0], np.float32), np.array([-0.93, -np.inf], np.float32),
        Samples.from_drawn([[1, 9, 9], [-1, -1, -1]]),
    )  # fmt: skip
    check_topk(topk, VOCAB)
    two = np.array([2, 0], np.uint16)
    return [
        (
            change(topk, ids=np.array([9, 1], np.int32)),
            "position 0: sampled ids are not in ascending order",
        ),
        (
            change(topk, ids=np.array([9, 9], np.int32)),
            "position 0: sampled ids are not in ascending order",
        ),
        (change(topk, ids=np.array([1, VOCAB], np.int32)), f"position 0: id {VOCAB} is outside"),
        (change(topk, ids=np.array([1, 4], np.int32)), "position 0: id 4 is both kept and sampled"),
        (change(topk, times=two + 1), "position 0: 4 draws, expected 3"),
        (change(topk, times=np.array([3, 0], np.uint16)), "position 0: id 9 was drawn 0 times"),
        (change(topk, times=two[:1]), "counts sum to 2 samples, found 2 ids and 1 times"),
        (change(topk, draws=0), "0 draws, expected 1 to 65535"),
        (change(topk, counts=two[:1]), "2 positions, but the samples have 1"),
        (replace(topk, samples=some(3, 2)), "position 1: .* sampled ids with a tail of -inf"),
        (
            replace(topk, tail_logprob=np.array([-0.93, -20], np.float32)),
            "position 1: 0 sampled ids with a tail of -20",
        ),
    ]


@pytest.mark.parametrize(("topk", "message"), wrong_records())
def test_what_are_no_samples_of_the_tail_is_refused(topk: TopK, message: str) -> None:
    with pytest.raises(InvalidRecord, match=message):
        check_topk(topk, VOCAB)


# ---- damage


def test_every_flipped_byte_is_detected() -> None:
    data = sampled.pack(some(), VOCAB)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x41
        with pytest.raises((CorruptPayload, FormatVersionError)):
            sampled.unpack(bytes(damaged))


@given(st.integers(0, 400), st.binary(max_size=400))
@settings(deadline=None)
def test_cut_or_foreign_bytes_are_errors(length: int, foreign: bytes) -> None:
    data = sampled.pack(some(), VOCAB)
    for bad in (data[: min(length, len(data) - 1)], foreign, data + b"\0"):
        with pytest.raises((CorruptPayload, FormatVersionError)):
            sampled.unpack(bad)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_forged_samples_are_errors_or_samples(drawn: st.DataObject) -> None:
    """Any header with its checksum made right, over good frames or none."""
    data = bytearray(sampled.pack(some(), VOCAB))
    for _ in range(drawn.draw(st.integers(1, 3))):
        data[drawn.draw(st.integers(5, sampled.HEADER.size - 5))] = drawn.draw(st.integers(0, 255))
    data[sampled.HEADER.size - 4 : sampled.HEADER.size] = zlib.crc32(
        data[: sampled.HEADER.size - 4]
    ).to_bytes(4, "little")
    try:
        found = sampled.unpack(bytes(data))
    except StorageError:
        return
    assert len(found.ids) == len(found.times) == found.counts.sum()


@given(st.data())
@settings(deadline=None, max_examples=400)
def test_any_planes_are_errors_or_samples(drawn: st.DataObject) -> None:
    """Good frames of any content, as a foreign writer's bug or malice would make them."""
    vocab_size = drawn.draw(st.sampled_from([0, 1, 5, 300, 1 << 31, (1 << 32) - 1]))
    draws, positions = drawn.draw(st.integers(0, 4)), drawn.draw(st.integers(0, 4))
    counts = drawn.draw(st.lists(st.integers(0, 4), min_size=positions, max_size=positions))
    width, more = drawn.draw(st.integers(1, 4)), drawn.draw(st.integers(0, 2))
    sizes = [sum(counts)] * (width + more)
    parts = [bytes(counts), *(drawn.draw(st.binary(min_size=n, max_size=n)) for n in sizes)]
    header = sampled.Header(
        sampled.Planes(1, width, more), draws, vocab_size, positions, sum(counts)
    )
    try:
        found = sampled.unpack(join(header.pack(), deflate([parts])))
    except StorageError:
        return
    assert fault(found, vocab_size) is None
    assert found.counts.tolist() == counts


def test_a_lying_header_allocates_nothing() -> None:
    header = sampled.Header(sampled.Planes(2, 1, 0), 65535, 1 << 20, 1 << 24, 1 << 31)
    with pytest.raises(CorruptPayload):
        sampled.unpack(header.pack() + bytes(12))


# ---- shards

SHAPES = pytest.mark.parametrize(("codec", "k"), [("v1", 8), ("v2", 8), ("v1", 0), ("v2", 0)])


@SHAPES
def test_shards_hold_samples(tmp_path: Path, codec: str, k: int) -> None:
    make_dump(tmp_path, codec=codec, k=k, samples=DRAWS)
    dataset, bare = LogitDataset(tmp_path), LogitDataset(tmp_path, samples=False)
    assert (dataset.draws, bare.draws) == (DRAWS, 0)
    for index in (7, 0, 9, -1):
        expected = random_record(index % 10, k=k, samples=DRAWS).topk.samples
        found = dataset[index].topk
        assert found.samples is not None
        assert expected is not None
        assert found.samples.same(expected)
        assert set(found.counts.tolist()) == {k}
        np.testing.assert_allclose(found.spread_tail().kept_mass(), 1, atol=1e-5)
        assert bare[index].topk.samples is None
        np.testing.assert_array_equal(bare[index].topk.ids, found.ids)
    report = verify(tmp_path)
    assert (report.ok, report.rows) == (True, 10), report


def test_the_exact_part_is_the_same_with_samples_or_without(tmp_path: Path) -> None:
    payloads = []
    for name, samples in [("with", DRAWS), ("without", 0)]:
        dump = make_dump(tmp_path / name, shards=1, samples=samples)
        table = pq.read_table(tmp_path / name / dump.shards()[0].file)
        payloads.append(table.column("payload").to_pylist())
    assert payloads[0] == payloads[1]


def test_the_plan_says_whether_there_are_samples(tmp_path: Path) -> None:
    writer = ShardWriter(create_dump(tmp_path / "a", plan(samples=DRAWS)).partition(0))
    with pytest.raises(InvalidRecord, match="document 'doc-1', chunk 0: 0 draws"):
        writer.write(random_record(1))
    with pytest.raises(InvalidRecord, match="5 draws, the plan has samples: 12"):
        writer.write(random_record(1, samples=5))
    writer = ShardWriter(create_dump(tmp_path / "b", plan()).partition(0))
    with pytest.raises(InvalidRecord, match="12 draws, the plan has samples: 0"):
        writer.write(random_record(1, samples=DRAWS))


@pytest.mark.parametrize("k", [0, 8])
def test_every_changed_byte_of_a_shard_is_detected(tmp_path: Path, k: int) -> None:
    dump = make_dump(tmp_path, shards=1, rows=4, k=k, samples=DRAWS)
    found = corrupt(dump, 300, np.random.default_rng(1))
    assert sum(found.values()) == 300
    assert found["by the hash and by reading"] > 280


def test_samples_of_another_row_name_file_and_row(tmp_path: Path) -> None:
    """A file that somebody wrote again, with the samples of two rows exchanged."""
    dump = create_dump(tmp_path, plan(samples=DRAWS))
    writer = ShardWriter(dump.partition(0))
    for tokens in (20, 30):
        writer.write(random_record(tokens, tokens, samples=DRAWS))
    first, second = writer.pending
    writer.pending = [
        first._replace(samples=second.samples),
        second._replace(samples=first.samples),
    ]
    marker = writer.commit({})
    dump.partition(0).finish({})
    dump.finish()
    with pytest.raises(
        StorageError, match=rf"{marker['file']}, row 0 .*19 positions, but the samples have 29"
    ):
        LogitDataset(tmp_path)[0]
    assert marker["file"] in verify(tmp_path).faults[0]


def test_the_golden_dump_with_samples_is_read_for_ever() -> None:
    folder = Path(__file__).parent / "golden"
    assert verify(folder / "sampled").ok
    expected = np.load(folder / "expected_samples.npz")
    for number, record in enumerate(LogitDataset(folder / "sampled")):
        found = record.topk.samples
        assert found is not None
        names = ("counts", "ids", "times")
        wanted = Samples(16, *(expected[f"{name}_{number}"] for name in names))
        assert found.same(wanted)


# ---- what a user sees


def test_inspect_and_export_show_samples(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    make_dump(tmp_path / "dump", samples=DRAWS)
    assert main(["inspect", str(tmp_path / "dump")]) == 0
    assert f"samples    {DRAWS} draws" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "dump"), "--row", "0"]) == 0
    assert f"/{DRAWS} of the tail" in capsys.readouterr().out
    dataset = LogitDataset(tmp_path / "dump")
    wanted = [record.topk.samples for record in dataset]
    for per in ("position", "sequence"):
        target = tmp_path / f"{per}.parquet"
        assert main(["export", str(tmp_path / "dump"), str(target), "--per", per]) == 0
        table = pq.read_table(target)
        for column, name in (("sampled_ids", "ids"), ("sampled_times", "times")):
            values = [value for row in table.column(column).to_pylist() for value in row]
            assert values == [value for one in wanted for value in getattr(one, name).tolist()]
    shutil.rmtree(tmp_path / "dump")
    make_dump(tmp_path / "dump")
    assert main(["export", str(tmp_path / "dump"), str(tmp_path / "bare.parquet")]) == 0
    assert "sampled_ids" not in pq.read_table(tmp_path / "bare.parquet").column_names


def test_a_record_of_samples_alone_has_no_entries(tmp_path: Path) -> None:
    record = random_record(1, k=0, samples=DRAWS)
    assert isinstance(record, Record)
    assert len(record.topk.ids) == 0
    assert record.topk.dense()[0].shape == (19, 0)
