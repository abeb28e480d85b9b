"""Change single bytes of a shard at random and read it: every change must be detected.

    python tests/fuzz/corrupt_shard.py --changes 100000

Writes a shard of each version, with masks and without. Each change is then read in two ways: the
file's hash is compared, as `verify` does, and all rows are decoded without it, as training does.
The hash must always differ. The reader must give the same rows or an error that names the file,
never other rows.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from storage import Dump, Record, StorageError
from storage.shard_reader import ShardReader
from tests.helpers.records import TARGETS, make_dump

SHAPES: list[dict[str, Any]] = [
    {"codec": "v1"},
    {"codec": "v2"},
    {"codec": "v1", "samples": 12},
    {"codec": "v1", "targets": TARGETS},
    {"codec": "v2", "targets": TARGETS},
    {"codec": "v3"},
    {"codec": "v3", "samples": 12, "targets": TARGETS},
]


def contents(reader: ShardReader) -> list[bytes]:
    return [digest(record) for record in reader]


def digest(record: Record) -> bytes:
    topk = record.topk
    arrays = [record.input_ids, topk.counts, topk.ids, topk.logprobs, topk.tail_logprob]
    if topk.samples is not None:
        arrays += [topk.samples.counts, topk.samples.ids, topk.samples.times]
    if record.targets is not None:
        arrays.append(record.targets)
    name = f"{record.doc_id}/{record.chunk}".encode()
    return hashlib.sha256(b"|".join([name, *(array.tobytes() for array in arrays)])).digest()


def corrupt(dump: Dump, changes: int, rng: np.random.Generator) -> dict[str, int]:
    """Count how the changes were detected. Raises AssertionError for one that was not."""
    (shard,) = dump.shards()
    file = Path(dump.store / shard.file)
    good = file.read_bytes()
    truth = contents(ShardReader(dump, shard))
    found = {"by the hash and by reading": 0, "by the hash; reads the same": 0}
    for _ in range(changes):
        bad = bytearray(good)
        at = int(rng.integers(len(bad)))
        bad[at] ^= int(rng.integers(1, 256))
        assert hashlib.sha256(bad).hexdigest() != shard.marker["sha256"]
        file.write_bytes(bad)
        try:
            same = contents(ShardReader(dump, shard)) == truth
        except StorageError as error:
            if shard.file not in str(error):
                raise AssertionError(f"byte {at}: {error} does not name the file") from None
            found["by the hash and by reading"] += 1
            continue
        assert same, f"byte {at} of {file.name}: other rows, and no error"
        found["by the hash; reads the same"] += 1
    file.write_bytes(good)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            dump = make_dump(Path(folder), shards=1, rows=4, **shape)
            changes = given.changes // len(SHAPES)
            found = corrupt(dump, changes, np.random.default_rng(given.seed))
        print(*shape.values(), found, flush=True)


if __name__ == "__main__":
    sys.exit(main())
