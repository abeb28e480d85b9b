"""What it takes to finish, resume, clean, verify and export a dump of many shards.

    git worktree add ../before 615d116
    python scripts/benchmarks/bench_administration.py ../before . --shards 1000 --rows 20000 80000

Each argument is a tree of this repository; all are measured in one run, one after the other. The
S3 server is moto, in a process of its own; a request is a call of the S3 client, each page of a
listing one. Its shards are copies of one with four rows, in ten partitions. The dumps of --rows are
local, of 16 shards of short rows; seconds are of the clock, the best of --repeat runs, and MB what
the process and its children take at most beyond the imports. Needs moto[server].
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTITIONS, BUCKET = 10, "bucket"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trees", nargs="+", type=Path, help="trees of this repository")
    parser.add_argument("--shards", type=int, default=1000, help="on S3; 0: none")
    parser.add_argument("--resume", type=int, nargs="*", default=[10, 2000], help="shards on S3")
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="rows of local dumps")
    parser.add_argument("--tokens", type=int, default=64, help="of a row")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(json.loads(given.measure))))
        return
    with tempfile.TemporaryDirectory() as folder:
        tasks = [{"what": "finalize", "shards": given.shards}] if given.shards else []
        tasks += [{"what": "resume", "shards": shards} for shards in given.resume]
        for rows in given.rows:
            dump = f"{folder}/{rows}"
            ask(
                given.trees[-1],
                {"what": "make", "dump": dump, "rows": rows, "tokens": given.tokens},
            )
            for what in ("verify", "verify 2", "export", "export 2"):
                tasks.append({"what": what, "dump": dump, "rows": rows, "repeat": given.repeat})
        for task in tasks:
            for tree in given.trees:
                size = task.get("shards") or task["rows"]
                for line in ask(tree, task):
                    print(
                        f"{tree.name or 'here':<12}{task['what']:<12}{size:>9,}  {line}", flush=True
                    )


def ask(tree: Path, task: dict[str, Any]) -> list[str]:
    """What a tree measures, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tree), "--measure", json.dumps(task)]
    found = subprocess.run(command, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE)
    lines: list[str] = json.loads(found.stdout.splitlines()[-1])
    return lines


def measure(task: dict[str, Any]) -> list[str]:
    what = task["what"]
    if what in ("finalize", "resume"):
        with s3_server():
            return list(finalize(task["shards"]) if what == "finalize" else resume(task["shards"]))
    if what == "make":
        make(Path(task["dump"]), task["rows"], PARTITIONS, task["tokens"])
        return []
    return [local(what, Path(task["dump"]), task["repeat"])]


@contextmanager
def s3_server() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def put(shards: int, partitions: int) -> str:
    """A dump on S3 whose shards are copies of one; none of its partitions is complete."""
    import boto3
    from botocore.config import Config

    from storage import Dump
    from storage.parsing import to_json

    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    client.create_bucket(Bucket=BUCKET)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make(path, 4, 1, 64, partitions)
        (shard,) = Dump(path).partition(0).shards
        data = {kind: (path / shard.file).with_suffix(kind) for kind in (".parquet", ".index")}
        client.put_object(Bucket=BUCKET, Key="dump/plan.json", Body=to_json(Dump(path).plan))
        for number in range(shards):
            partition, index = divmod(number, shards // partitions)
            name = f"{partition:05d}/{index:05d}"
            marker = {**shard.marker, "file": f"{index:05d}-{number:012x}.parquet"}
            for kind, file in data.items():
                key = f"dump/{name}-{number:012x}{kind}"
                client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())
            client.put_object(Bucket=BUCKET, Key=f"dump/{name}.json", Body=to_json(marker))
    return f"s3://{BUCKET}/dump"


def make(path: Path, rows: int, shards: int, tokens: int, partitions: int = 1) -> None:
    """A dump of `shards` shards in its first partition, finished if it has no other."""
    import numpy as np

    from storage import Record, ShardWriter, TopK, create_dump

    plan = {"vocab_size": 1000, "k": 8, "step": 1 / 416, "partitions": partitions, "codec": "v3"}
    dump, rng = create_dump(path, plan), np.random.default_rng(0)
    for shard in range(shards):
        writer = ShardWriter(dump.partition(0), shard)
        for row in range(shard * rows // shards, (shard + 1) * rows // shards):
            values = np.sort(rng.normal(0, 2, (tokens - 1, 8)), axis=1)[:, ::-1]
            logprobs = values - np.log(np.exp(values).sum(1, keepdims=True)) - 0.05
            tail = np.log(-np.expm1(np.log(np.exp(logprobs).sum(1))))
            ids = (rng.integers(0, 992, (tokens - 1, 1)) + np.arange(8)).astype(np.int32)
            input_ids = rng.integers(0, 1000, tokens).astype(np.int32)
            topk = TopK.from_dense(ids, logprobs.astype(np.float32), tail.astype(np.float32))
            writer.write(Record(f"document-{row:08d}", 0, input_ids, topk))
        writer.commit({"document": rows}, {"documents": rows})
    if partitions == 1:
        dump.partition(0).finish({"documents": rows, "skipped": 0})
        dump.finish()


@contextmanager
def counting() -> Iterator[list[int]]:
    """Counts the calls of S3 clients of s3fs."""
    from aiobotocore.client import AioBaseClient

    original, calls = AioBaseClient._make_api_call, [0]

    async def counted(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        return await original(self, *arguments)

    AioBaseClient._make_api_call = counted
    try:
        yield calls
    finally:
        AioBaseClient._make_api_call = original


def timed(name: str, work: Callable[[], Any]) -> str:
    with counting() as calls:
        began = time.monotonic()
        work()
        return f"{name}: {calls[0]:,} requests, {time.monotonic() - began:.1f} s"


def finalize(shards: int) -> Iterator[str]:
    from pipeline.dump import dump
    from storage import Dump
    from storage.gc import leftovers

    address = put(shards, PARTITIONS)

    def ends() -> None:
        for partition in Dump(address).partitions:
            partition.finish({"documents": 4 * shards // PARTITIONS, "skipped": 0})

    yield timed("ends of partitions", ends)
    opened = Dump(address)
    yield timed("finalize", lambda: dump.finalize(opened, range(PARTITIONS), "finalize", None))
    yield timed("gc", lambda: leftovers(address))


def resume(shards: int) -> Iterator[str]:
    from pipeline.dump.partitions import what_is_missing
    from pipeline.dump.plan import plan_there
    from storage import create_dump

    address = put(shards, 1)

    def resumed() -> None:
        plan = plan_there(address)
        assert plan is not None
        partition = create_dump(address, plan).partition(0)
        assert partition.summary is None
        assert what_is_missing(partition, 4).shard == shards

    yield timed("resume", resumed)


def local(what: str, dump: Path, repeat: int) -> str:
    """The seconds and the memory of `verify` or `export`, in so many processes."""
    import numba  # noqa: F401

    from storage import LogitDataset, verify
    from storage.export import export

    command, _, jobs = what.partition(" ")
    options = {"jobs": int(jobs)} if jobs else {}
    seconds, before = [], peak()
    try:
        for number in range(repeat):
            target = f"{dump}-{os.getpid()}-{number}" + ("/" if jobs else ".parquet")
            began = time.monotonic()
            if command == "verify":
                assert verify(dump, **options).ok
            else:
                export(LogitDataset(dump), target, "sequence", **options)
            seconds.append(time.monotonic() - began)
    except TypeError:
        return "cannot"
    return f"{min(seconds):.1f} s, {peak() - before:.0f} MB"


def peak() -> float:
    """The most memory that this process has taken, and the largest of its children, in MB."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024


if __name__ == "__main__":
    main()
