"""Bytes per token, distortion and speed of the stored format, on one core.

    python scripts/benchmarks/storage.py runs/demo/dump sample.npz --k 64

Takes finished dumps, or .npz files with input_ids [N, T], ids and logprobs [N, T, K] and
vocab_size. Writes each as a real shard and reads it back as a reader would. A dump's distributions
have been through the codec once: their KL here is that of a second time. Its first error, measured
against the teacher while it was written, is what `python -m storage inspect` shows.
"""

import argparse
import os
import sys

sys.path.pop(0)  # this file's folder: its name would hide the package
os.environ["OMP_NUM_THREADS"] = "1"  # one core: what is measured is work, not the machine

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import LogitDataset, Ranks, Record, ShardWriter, TopK, create_dump, decode, encode
from storage.topk import codec_kl


def load(path: Path, k: int, limit: int) -> tuple[list[Record], int]:
    """(rows with at most k entries per position, vocabulary size)."""
    if path.suffix != ".npz":
        dataset = LogitDataset(path)
        rows, tokens = [], 0
        for record in dataset:
            rows.append(record)
            tokens += len(record.input_ids)
            if tokens >= limit:
                break
        return rows, int(dataset.plan["vocab_size"])
    data = np.load(path)
    rows = []
    for number, input_ids in enumerate(data["input_ids"]):
        logprobs = np.minimum(data["logprobs"][number, :-1, :k].astype(np.float64), 0)
        # The file has no tail; the mass that is not there is one.
        tail = np.log(np.maximum(1 - np.exp(logprobs).sum(1), 1e-9))
        topk = TopK.from_dense(data["ids"][number, :-1, :k], logprobs, tail)
        rows.append(Record(str(number), 0, input_ids, topk))
    return rows, int(data["vocab_size"])


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The fastest of a few runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def version_1(rows: list[Record], vocab_size: int, step: float, folder: Path) -> list[float]:
    """[bytes per token in a shard, payload bytes per token, KL mean, KL max, encode, decode]."""
    dump = create_dump(folder, {"vocab_size": vocab_size, "step": step, "partitions": 1})
    writer = ShardWriter(dump.partition(0))
    for row in rows:
        writer.write(row)
    marker = writer.commit(cursor={})
    dump.partition(0).finish({})
    dump.finish()
    dataset = LogitDataset(folder)
    kl = np.concatenate(
        [codec_kl(row.topk, stored.topk) for row, stored in zip(rows, dataset, strict=True)]
    )
    ranks = Ranks.learn([row.topk for row in rows[:32]], vocab_size)
    payloads = [encode(row.topk, vocab_size=vocab_size, step=step, ranks=ranks) for row in rows]
    tokens = sum(len(row.input_ids) for row in rows)

    def decode_all() -> None:
        for payload in payloads:
            decode(payload, ranks)

    def encode_all() -> None:
        for row in rows:
            encode(row.topk, vocab_size=vocab_size, step=step, ranks=ranks)

    return [
        marker["bytes"] / tokens,
        sum(map(len, payloads)) / tokens,
        float(kl.mean()),
        float(kl.max()),
        tokens / seconds(encode_all),
        tokens / seconds(decode_all),
    ]


def lists(rows: list[Record], file: Path) -> list[float]:
    """What one would write without thinking: int32 and float16 lists in Parquet with zstd."""

    def write() -> None:
        table = pa.table(
            {
                "ids": pa.array([row.topk.ids for row in rows], pa.list_(pa.int32())),
                "logprobs": pa.array(
                    [row.topk.logprobs.astype(np.float16) for row in rows], pa.list_(pa.float16())
                ),
                "tail": pa.array(
                    [row.topk.tail_logprob.astype(np.float16) for row in rows],
                    pa.list_(pa.float16()),
                ),
                "input_ids": pa.array([row.input_ids for row in rows], pa.list_(pa.int32())),
            }
        )
        pq.write_table(table, file, compression="zstd", row_group_size=32)

    def read() -> None:
        with pq.ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                table = opened.read_row_group(group, use_threads=False)
                for column in ("ids", "logprobs", "tail"):
                    for value in table.column(column):
                        value.values.to_numpy(zero_copy_only=False).astype(np.float32)

    tokens = sum(len(row.input_ids) for row in rows)
    write_time = seconds(write, 1)
    size = file.stat().st_size / tokens
    stored = [
        TopK(
            row.topk.counts,
            row.topk.ids,
            row.topk.logprobs.astype(np.float16).astype(np.float32),
            row.topk.tail_logprob.astype(np.float16).astype(np.float32),
        )
        for row in rows
    ]
    kl = np.concatenate([codec_kl(row.topk, s) for row, s in zip(rows, stored, strict=True)])
    speeds = [tokens / write_time, tokens / seconds(read)]
    return [size, size, float(np.abs(kl).mean()), float(np.abs(kl).max()), *speeds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="DUMP_OR_NPZ")
    parser.add_argument("--k", type=int, default=64, help="entries taken from a .npz")
    parser.add_argument("--steps", default="0.0625,0.125,0.25", help="grids in nats")
    parser.add_argument("--tokens", type=int, default=200_000, help="taken from a dump")
    given = parser.parse_args()
    pa.set_cpu_count(1)
    head = f"{'layout':<26}{'bytes/token':>12}{'payload':>9}{'KL mean':>10}{'KL max':>10}"
    head += f"{'encode/s':>11}{'decode/s':>11}"
    for path in given.paths:
        rows, vocab_size = load(path, given.k, given.tokens)
        tokens = sum(len(row.input_ids) for row in rows)
        print(f"\n{path}: {len(rows)} rows, {tokens:,} tokens, vocabulary {vocab_size:,}")
        print(head)
        with tempfile.TemporaryDirectory() as folder:
            found = [("Parquet lists int32 + fp16", lists(rows, Path(folder) / "lists.parquet"))]
            for step in map(float, given.steps.split(",")):
                target = Path(folder) / f"dump-{step}"
                found.append(
                    (f"version 1, step {step:g}", version_1(rows, vocab_size, step, target))
                )
        for name, (shard, payload, mean, worst, encoded, decoded) in found:
            print(
                f"{name:<26}{shard:>12.1f}{payload:>9.1f}{mean:>10.1e}{worst:>10.1e}"
                f"{encoded:>11,.0f}{decoded:>11,.0f}"
            )


if __name__ == "__main__":
    main()
