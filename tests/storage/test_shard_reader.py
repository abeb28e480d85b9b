"""ShardReader: old files stay readable, and damage is an error that names the file."""

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import (
    CorruptShard,
    FormatVersionError,
    LogitDataset,
    Record,
    Samples,
    ShardWriter,
    StorageError,
    TopK,
    create_dump,
    verify,
)
from storage.codec import samples as sampled
from storage.codec.codec import pack
from storage.codec.frames import Header, Planes, deflate, join, split_planes
from storage.codec.grid import quantise
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import Successors
from storage.own_tables import pack_ranks
from storage.targets import pack_mask
from tests.fuzz.corrupt_shard import corrupt
from tests.helpers.forged import SHAPES, data_file, first_is, rewrite, with_column, zeros
from tests.helpers.records import (
    TARGETS,
    VOCAB,
    assert_same,
    cut_short,
    flip_byte,
    make_dump,
    plan,
    random_mask,
    random_record,
    some_samples,
)

CODECS = pytest.mark.parametrize("codec", ["v1", "v2", "v3"])
DRAWS = 12
PLAIN = {
    name: "none" if name in ("payload", "successors") else "zstd"
    for name in ("doc_id", "chunk", "tokens", "input_ids.list.element", "targets", "payload",
                 "successors")
}  # fmt: skip


@pytest.mark.parametrize("codec", ["v1", "v2"])
def test_golden_dumps_are_read_for_ever(codec: str) -> None:
    """tests/storage/golden holds dumps that the first release of each version wrote."""
    folder = Path(__file__).parent / "golden"
    dataset, expected = LogitDataset(folder / codec), np.load(folder / "expected.npz")
    assert verify(folder / codec).ok
    for number in range(4):
        names = ("input_ids", "counts", "ids", "logprobs", "tail_logprob")
        input_ids, *arrays = (expected[f"{name}_{number}"] for name in names)
        wanted = Record(f"doc-{number}", 0, input_ids, TopK(*arrays))
        assert_same(dataset[number], wanted, tolerance=1e-5)


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


@CODECS
def test_reading_a_cut_or_flipped_shard_names_it(tmp_path: Path, codec: str) -> None:
    dump = make_dump(tmp_path, codec=codec)
    first, second = (tmp_path / shard.file for shard in dump.shards())
    flip_byte(first)
    cut_short(second)
    dataset = LogitDataset(tmp_path)
    for file, rows in ((first, range(5)), (second, range(5, 10))):
        with pytest.raises(CorruptShard, match=file.name):
            [dataset[row] for row in rows]


@CODECS
def test_every_changed_byte_of_a_shard_is_detected(tmp_path: Path, codec: str) -> None:
    """300 of the changes that tests/fuzz/corrupt_shard.py makes 100,000 times."""
    dump = make_dump(tmp_path, shards=1, rows=4, codec=codec)
    found = corrupt(dump, 300, np.random.default_rng(1))
    assert sum(found.values()) == 300
    assert found["by the hash and by reading"] > 280


@pytest.mark.parametrize("k", [0, 8])
def test_every_changed_byte_of_a_shard_with_samples_is_detected(tmp_path: Path, k: int) -> None:
    dump = make_dump(tmp_path, shards=1, rows=4, k=k, samples=DRAWS)
    found = corrupt(dump, 300, np.random.default_rng(1))
    assert sum(found.values()) == 300
    assert found["by the hash and by reading"] > 280


@pytest.mark.parametrize(("codec", "samples"), [("v1", DRAWS), ("v2", 0)])
def test_every_changed_byte_of_a_shard_with_masks_is_detected(
    tmp_path: Path, codec: str, samples: int
) -> None:
    dump = make_dump(tmp_path, shards=1, rows=4, codec=codec, samples=samples, targets=TARGETS)
    found = corrupt(dump, 300, np.random.default_rng(1))
    assert sum(found.values()) == 300
    assert found["by the hash and by reading"] > 280


@CODECS
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (b"", "a mask of 0 bytes, expected 3 for 20 tokens"),
        (bytes(3), "the mask marks no token"),
        (b"\x03\x00\x00", "the mask marks the first token"),
        (b"\x02\x00\x80", "or one behind the last"),
        (b"\x02\x00\x00", "[0-9]+ positions; its row has 1$"),
        (None, "targets claims|holds nulls|expected one column targets"),
    ],
)
def test_a_mask_that_is_not_its_rows_names_file_and_row(
    tmp_path: Path, codec: str, mask: bytes | None, message: str
) -> None:
    make_dump(tmp_path, shards=1, rows=3, codec=codec, targets=TARGETS)
    rewrite(tmp_path, first_is("targets", mask))
    read_fails(tmp_path, message if mask is None else rf"row 0 \(document 'doc-0'.*{message}")


def test_a_mask_of_as_many_other_tokens(tmp_path: Path) -> None:
    """Version 2 needs the right one to decode; of version 1, verify compares head and column."""
    mask = np.zeros(20, bool)
    mask[1 : 1 + int(random_mask(20).sum())] = True
    for codec in ("v1", "v2"):
        make_dump(tmp_path / codec, shards=1, rows=3, codec=codec, targets=TARGETS)
        own = pq.read_table(data_file(tmp_path / codec))
        rewrite(tmp_path / codec, lambda _, own=own: first_is("targets", pack_mask(mask))(own),
                compression=PLAIN)  # fmt: skip
    (fault,) = verify(tmp_path / "v1").faults
    assert re.search("row 0: the head in the payload says other than the columns", fault)
    read_fails(tmp_path / "v2", "the payload needs the successors .* input_ids of its own row")


def test_samples_of_another_row_name_file_and_row(tmp_path: Path) -> None:
    """A file whose writer exchanged the samples of two rows."""
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
        StorageError, match=rf"{marker['file']}, row 0 .*29 positions; its row has 19"
    ):
        LogitDataset(tmp_path)[0]
    assert marker["file"] in verify(tmp_path).faults[0]


VALID = {
    "as it is",
    "a column more",
    "columns in another order",
    "a row per row group",
    "not compressed",
    "pages of version 2",
    "no page checksums",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes_are_read_or_named(tmp_path: Path, shape: str) -> None:
    """Parquet files that are no shards, or shards that another writer made."""
    make_dump(tmp_path, shards=1, rows=3)
    change, options = SHAPES[shape]
    rewrite(tmp_path, change, **options)
    report = verify(tmp_path)
    assert report.ok == (shape in VALID), report
    assert all(fault.startswith("00000/00000") for fault in report.faults)
    if report.ok:
        assert_same(LogitDataset(tmp_path)[2], random_record(2))


def read_fails(path: Path, message: str) -> None:
    """Reading row 0 is refused with this message, in little memory."""
    tracemalloc.start()
    with pytest.raises(CorruptShard, match=message) as refused:
        LogitDataset(path)[0]
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    assert data_file(path).name in str(refused.value)
    assert data_file(path).name in verify(path).faults[0]


def first_payload(path: Path, payload: bytes, **more: object) -> None:
    rewrite(path, first_is("payload", payload), **more)  # type: ignore[arg-type]


def constant(positions: int, k: int, vocab: int = VOCAB, needs: int = 0) -> bytes:
    """A payload of k zeros at each position, a few bytes long."""
    planes = [split_planes(np.array([k]), 2), [bytes(positions * k)], [bytes([1]) * positions]]
    header = Header(1, Planes(0, 1, 0, 0, 1), 1 / 16, vocab, positions, positions * k, needs)
    return join(header.pack(), deflate(planes))


@pytest.mark.parametrize(
    ("positions", "k", "marker", "message"),
    [
        (2048, 300, {}, "2048 positions; its row has 19"),
        (19, 300, {}, "5700 entries in a row, expected at most 8 at each of 19 positions"),
        (19, 300, {"entries": 1000}, "expected at most 300 at .* and at most 1000 in all"),
    ],
)
def test_a_row_bounds_its_payload(
    tmp_path: Path, positions: int, k: int, marker: dict, message: str
) -> None:
    make_dump(tmp_path, shards=1, rows=3)
    first_payload(tmp_path, constant(positions, k), marker=marker)
    read_fails(tmp_path, message)


def test_a_header_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    for name, payload in (("a", constant(19, 8, 1 << 20)), ("b", constant(19, 8, 100))):
        make_dump(tmp_path / name, shards=1, rows=3)
        first_payload(tmp_path / name, payload)
        read_fails(tmp_path / name, "a vocabulary of .* ids, the plan says 300")


def test_tables_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    """As a hostile writer would make them: payloads and tables that agree, and no plan."""
    vocab = 1 << 20
    rows = [(record.input_ids, quantise(record.topk, vocab, 1 / 16)) for record in RECORDS]
    ranks, tables = Ranks.learn((grid for _, grid in rows), vocab), Successors.learn(rows, vocab)
    make_dump(tmp_path / "v1", shards=1, rows=3)
    payloads = [pack(grid, ranks) for _, grid in rows]
    column = with_column("payload", lambda _: pa.array(payloads, pa.binary()))
    rewrite(tmp_path / "v1", column, {b"ranks": pack_ranks(ranks)})
    read_fails(tmp_path / "v1", "rank table for a vocabulary of 1048576 ids, the plan says 300")
    make_dump(tmp_path / "v2", shards=1, rows=3, codec="v2")
    rewrite(tmp_path / "v2", first_is("successors", tables.pack()))
    read_fails(tmp_path / "v2", "a vocabulary of 1048576 ids, the plan says 300")
    make_dump(tmp_path / "s", shards=1, rows=3, samples=DRAWS)
    rewrite(tmp_path / "s", first_is("samples", sampled.pack(some_samples(DRAWS, 19), vocab)))
    read_fails(tmp_path / "s", "a vocabulary of 1048576 ids, the plan says 300")
    rewrite(tmp_path / "s", first_is("samples", sampled.pack(some_samples(7, 19), VOCAB)))
    read_fails(tmp_path / "s", "7 draws, the plan says 12|at most 12|133 entries")


RECORDS = [random_record(number) for number in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_is("payload", bytes(60_000_000)), "payload of .* claims 600.* when decompressed"),
        (with_column("input_ids", lambda c: zeros(c, 30_000_000)), "input_ids.* when decompressed"),
        (with_column("doc_id", lambda c: pa.array(["x" * 40_000_000] * len(c))), "doc_id.* claims"),
    ],
)
def test_columns_that_inflate_are_not_read(tmp_path: Path, change: Callable, message: str) -> None:
    make_dump(tmp_path, shards=1, rows=3)
    rewrite(tmp_path, change)
    read_fails(tmp_path, message)


def test_a_dictionary_cannot_repeat_a_value(tmp_path: Path) -> None:
    make_dump(tmp_path, shards=1, rows=3)
    rewrite(tmp_path, with_column("input_ids", lambda c: zeros(c, 3_000_000)), use_dictionary=True)
    read_fails(tmp_path, "has encodings .*DICTIONARY")


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({b"format": b"mol-topk/9"}, FormatVersionError, "mol-topk/9.* update mol-distill"),
        ({b"format": b"pandas"}, CorruptShard, "this Parquet file is not a shard"),
        ({b"format": None}, CorruptShard, "not a shard"),
        ({b"format": b"mol-topk/2"}, CorruptShard, "its codec is v2, the plan says v1"),
        ({b"shard": b"00000/00001"}, CorruptShard, "data files were swapped"),
        ({b"shard": None}, CorruptShard, "data files were swapped"),
        ({b"plan_sha256": None}, CorruptShard, "another plan"),
        ({b"ranks": None}, CorruptShard, "rank table in the footer is damaged"),
        ({b"ranks": b"00"}, CorruptShard, "rank table in the footer is damaged"),
        ({b"ranks": b"\xff"}, CorruptShard, "rank table in the footer is damaged"),
    ],
)
def test_metadata_that_are_not_this_shards(
    tmp_path: Path, metadata: dict, error: type, message: str
) -> None:
    make_dump(tmp_path, shards=1, rows=3)
    rewrite(tmp_path, metadata=metadata)
    with pytest.raises(error, match=rf"{data_file(tmp_path).name}.*{message}"):
        LogitDataset(tmp_path)[0]
    assert not verify(tmp_path).ok


def test_tokens_must_add_up_before_they_are_trusted(tmp_path: Path) -> None:
    make_dump(tmp_path, shards=1, rows=3)
    rewrite(tmp_path, first_is("tokens", 1 << 30))
    with pytest.raises(CorruptShard, match="row 0: the column tokens is not the length of input_"):
        LogitDataset(tmp_path).lengths  # noqa: B018
    with pytest.raises(CorruptShard, match="does not add up to the marker's 60 tokens"):
        LogitDataset(tmp_path, partial=True).lengths  # noqa: B018


def test_targets_must_add_up_before_they_are_trusted(tmp_path: Path) -> None:
    make_dump(tmp_path, shards=1, rows=3, targets=TARGETS)
    rewrite(tmp_path, first_is("targets", b"\xff" * 1000))
    with pytest.raises(CorruptShard, match=r"does not add up to the marker's .* positions"):
        LogitDataset(tmp_path, partial=True).target_counts  # noqa: B018
