"""What a row of a dump costs, in order and shuffled, over 10 to 2,000 shards.

    PYTHONPATH=. python scripts/benchmarks/bench_rows.py SAMPLE.npz --shards 10 100 2000

Writes one shard of SAMPLE.npz (see bench_storage.py) in each version and links it until there are
so many shards, so a thousand shards take the disk of one. Rows are then read one by one:

    bytes     read ÷ bytes of a row in its file, through a file system that counts
    requests  to that file system for each row
    openings  of a shard as Parquet, for each row
    ms        CPU time for each row, from local files
    start     requests, and milliseconds of CPU, of LogitDataset and its `lengths`

`--warm` rows are read first, in the same order: what is kept is then there. Times are of one core,
whatever else the machine does; compare them within one run.
"""

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from bench_storage import load

from storage import LogitDataset, ShardWriter, create_dump, index_files
from storage.shard_reader import ShardReader
from tests.helpers.linked import Counted, counted, link_shards, names_ignored, row_bytes


def linked(folder: Path, sample: Path, codec: str, shards: int, tokens: int) -> Path:
    """A finished dump of `shards` links to one shard."""
    first = folder / f"{codec}-first"
    if not first.exists():
        rows, vocab = load(sample, tokens)
        dump = create_dump(
            first, {"vocab_size": vocab, "step": 1 / 16, "partitions": 1, "codec": codec}
        )
        writer = ShardWriter(dump.partition(0))
        for row in rows:
            writer.write(row)
        writer.commit({})
    path = folder / f"{codec}-{shards}"
    shutil.copytree(first, path)
    link_shards(path, shards)
    return path


def orders(dataset: LogitDataset, rows: int) -> Iterator[tuple[str, list[int]]]:
    yield "in order", (np.arange(rows) % len(dataset)).tolist()
    rng = np.random.default_rng(0)
    yield "shuffled", rng.integers(len(dataset), size=rows).tolist()


def measure(path: Path, codec: str, shards: int, rows: int, warm: int) -> None:
    began = time.process_time()
    dataset = LogitDataset(path)
    dataset.lengths  # noqa: B018
    start = 1000 * (time.process_time() - began)
    remote = LogitDataset(counted(path))
    remote.lengths  # noqa: B018
    asked = sum(Counted.requests.values())
    opened: list[str] = []
    make = ShardReader.__init__

    def counting(self: ShardReader, *given: object) -> None:
        opened.append("")
        make(self, *given)  # type: ignore[arg-type]

    for (name, order), (_, again) in zip(
        orders(dataset, rows + warm), orders(dataset, rows + warm), strict=True
    ):
        for at in order[:warm]:
            dataset[at]
        began = time.process_time()
        for at in order[warm:]:
            dataset[at]
        spent = 1000 * (time.process_time() - began) / rows
        for at in again[:warm]:
            remote[at]
        Counted.reset()
        opened.clear()
        ShardReader.__init__ = counting  # type: ignore[method-assign]
        for at in again[warm:]:
            remote[at]
        ShardReader.__init__ = make  # type: ignore[method-assign]
        requests = sum(Counted.requests.values()) / rows
        print(
            f"{codec:<4}{shards:>7,}  {name:<9}{Counted.bytes / rows / row_bytes(path):>8.2f}"
            f"{requests:>10.2f}{len(opened) / rows:>10.3f}{spent:>8.2f}{asked:>8}{start:>8.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 100, 2000])
    parser.add_argument("--codecs", nargs="+", default=["v1", "v2"])
    parser.add_argument("--rows", type=int, default=1000, help="read in each order")
    parser.add_argument("--warm", type=int, default=0, help="read before")
    parser.add_argument("--tokens", type=int, default=1 << 30, help="of the shard at most")
    given = parser.parse_args()
    print("     shards  order       bytes  requests  openings      ms   start      ms")
    with tempfile.TemporaryDirectory() as name, names_ignored():
        index_files.user_cache = lambda: Path(name) / "cache"
        for codec in given.codecs:
            for shards in given.shards:
                path = linked(Path(name), given.sample, codec, shards, given.tokens)
                measure(path, codec, shards, given.rows, given.warm)
                shutil.rmtree(path)


if __name__ == "__main__":
    main()
