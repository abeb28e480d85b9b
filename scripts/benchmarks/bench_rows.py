"""What a row of a dump costs, in order and shuffled, over 10 to 5,000 shards.

    PYTHONPATH=. python scripts/benchmarks/bench_rows.py SAMPLE.npz
    PYTHONPATH=. python scripts/benchmarks/bench_rows.py SAMPLE.npz --s3 --tokens 1024 --shards 10

Writes one shard of SAMPLE.npz (see bench_storage.py) in each version and links it until there are
so many shards, so a thousand shards take the disk of one. Rows are then read one by one:

    bytes     read ÷ bytes of a row in its file, through a file system that counts
    requests  to that file system for each row
    openings  of a shard as Parquet, for each row
    us        CPU time for each token, from local files
    MB        of memory that the readers keep after these rows
    start     requests, and milliseconds of CPU, of LogitDataset and its `lengths`

With `--s3`, the dump is copied to an S3 server on this machine, whose requests a proxy counts; no
time is then shown. `--warm` rows are read first, in the same order: what is kept is then there.
Times are of one core, whatever else the machine does; compare them within one run.
"""

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_storage import load

from storage import LogitDataset, Record, ShardWriter, create_dump, index_files
from storage.codec.codec import STEPS
from storage.shard_reader import ShardReader
from tests.helpers.linked import Counted, counted, link_shards, names_ignored, row_bytes

ORDERS = ("in order", "shuffled")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Cost:
    """What the rows of one dump cost in one order; see the module."""

    start_requests: int
    start_ms: float
    requests: float = 0.0
    bytes: float = 0.0
    openings: float = 0.0
    us: float = 0.0
    memory: float = 0.0


def linked(folder: Path, rows: Sequence[Record], vocab: int, codec: str, shards: int) -> Path:
    """A finished dump of `shards` links to one shard of these rows."""
    first = folder / f"{codec}-first"
    if not first.exists():
        plan = {"vocab_size": vocab, "step": STEPS[codec], "partitions": 1, "codec": codec}
        writer = ShardWriter(create_dump(first, plan).partition(0))
        for row in rows:
            writer.write(row)
        writer.commit({})
    path = folder / f"{codec}-{shards}"
    shutil.copytree(first, path)
    link_shards(path, shards)
    return path


def order_of(name: str, rows: int, length: int) -> list[int]:
    """Which rows are read, one after the other."""
    if name == "in order":
        return (np.arange(rows) % length).tolist()
    return np.random.default_rng(0).integers(length, size=rows).tolist()


@contextlib.contextmanager
def openings() -> Iterator[list[str]]:
    """The shards that are opened as Parquet meanwhile."""
    found: list[str] = []
    make = ShardReader.__init__

    def counting(self: ShardReader, *given: Any) -> None:
        found.append(given[1].name)
        make(self, *given)

    ShardReader.__init__ = counting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        ShardReader.__init__ = make  # type: ignore[method-assign]


def resident() -> float:
    """MB of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def started(path: str | Path) -> LogitDataset:
    dataset = LogitDataset(path)
    dataset.lengths  # noqa: B018
    return dataset


def counts(
    remote: str, path: Path, order: str, rows: int, warm: int, asked: Callable[[], tuple[int, int]]
) -> Cost:
    """Requests, bytes and openings, by a store at `remote`; `asked` gives its requests and bytes
    since the last call. `path` is the same dump on this machine."""
    asked()
    dataset = started(remote)
    cost = Cost(asked()[0], 0.0)
    which = order_of(order, rows + warm, len(dataset))
    for at in which[:warm]:
        dataset[at]
    asked()
    with openings() as opened:
        for at in which[warm:]:
            dataset[at]
    requests, size = asked()
    cost.requests, cost.openings = requests / rows, len(opened) / rows
    cost.bytes = size / rows / row_bytes(path)
    return cost


def times(cost: Cost, path: Path, order: str, rows: int, warm: int) -> None:
    """Add CPU times and memory, of local files."""
    began = time.process_time()
    dataset = started(path)
    cost.start_ms = 1000 * (time.process_time() - began)
    which = order_of(order, rows + warm, len(dataset))
    for at in which[:warm]:
        dataset[at]
    before, began, tokens = resident(), time.process_time(), 0
    for at in which[warm:]:
        tokens += len(dataset[at].input_ids)
    cost.us = 1e6 * (time.process_time() - began) / tokens
    cost.memory = resident() - before


def by_files() -> tuple[int, int]:
    """Requests and bytes of the file system that counts, since the last call."""
    found = sum(Counted.requests.values()), Counted.bytes
    Counted.reset()
    return found


@contextlib.contextmanager
def s3(rate: float = 0.0) -> Iterator[tuple[Callable[[Path, str], str], Any]]:
    """(copies a dump to a bucket and gives its address, requests and bytes since the last call)."""
    from tests.helpers.s3 import FaultyProxy, MotoServer, environment

    with MotoServer() as server, FaultyProxy(server.port, rate) as proxy:
        client = server.client()
        client.create_bucket(Bucket="bench")
        os.environ.update(environment(proxy.port))

        def copied(path: Path, name: str) -> str:
            for file in path.rglob("*"):
                if file.is_file():
                    client.upload_file(str(file), "bench", f"{name}/{file.relative_to(path)}")
            return f"s3://bench/{name}"

        def asked() -> tuple[int, int]:
            found = proxy.requests, proxy.sent
            proxy.requests = proxy.sent = 0
            return found

        yield copied, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 100, 2000, 5000])
    parser.add_argument("--codecs", nargs="+", default=["v1", "v3"])
    parser.add_argument("--rows", type=int, default=1000, help="read in each order")
    parser.add_argument("--warm", type=int, default=0, help="read before")
    parser.add_argument("--tokens", type=int, default=1 << 30, help="of the shard at most")
    parser.add_argument("--s3", action="store_true", help="count the requests to an S3 server")
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    rows, vocab = load(given.sample, given.tokens)
    while sum(len(row.input_ids) for row in rows) > given.tokens:
        rows.pop()
    print("     shards  order       bytes  requests  openings      us      MB   start      ms")
    with (
        tempfile.TemporaryDirectory() as name,
        names_ignored(),
        s3() if given.s3 else contextlib.nullcontext((None, by_files)) as (copied, asked),
    ):
        index_files.user_cache = lambda: Path(name) / "cache"
        for codec in given.codecs:
            for shards in given.shards:
                path = linked(Path(name), rows, vocab, codec, shards)
                remote = copied(path, path.name) if copied else counted(path)
                for order in ORDERS:
                    cost = counts(remote, path, order, given.rows, given.warm, asked)
                    if not given.s3:
                        times(cost, path, order, given.rows, given.warm)
                    print(
                        f"{codec:<4}{shards:>7,}  {order:<9}{cost.bytes:>8.2f}"
                        f"{cost.requests:>10.2f}{cost.openings:>10.3f}{cost.us:>8.2f}"
                        f"{cost.memory:>8.1f}{cost.start_requests:>8}{cost.start_ms:>8.1f}"
                    )
                shutil.rmtree(path)


if __name__ == "__main__":
    main()
