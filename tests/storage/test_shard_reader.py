"""ShardReader: old files stay readable, and damage is an error that names the file."""

from pathlib import Path

import numpy as np
import pytest

from storage import (
    CorruptShard,
    LogitDataset,
    Record,
    Samples,
    ShardWriter,
    StorageError,
    TopK,
    create_dump,
    verify,
)
from tests.fuzz.corrupt_shard import corrupt
from tests.helpers.records import assert_same, cut_short, flip_byte, make_dump, plan, random_record

CODECS = pytest.mark.parametrize("codec", ["v1", "v2"])
DRAWS = 12


@CODECS
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
        StorageError, match=rf"{marker['file']}, row 0 .*19 positions, but the samples have 29"
    ):
        LogitDataset(tmp_path)[0]
    assert marker["file"] in verify(tmp_path).faults[0]
