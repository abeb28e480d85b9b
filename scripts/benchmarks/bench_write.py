"""What the writer of a shard costs: CPU time of a token, and memory.

    python scripts/benchmarks/bench_write.py DUMP --rounds 3

Reads a dump as bench_storage.py does, and writes its rows with ShardWriter as stage one does.
Every case is a process, and a round runs all in turn; `read` reads the rows and writes none.

    us      CPU time of all threads for each token, without reading: cut-off, grid, its KL, coding,
            decoding again, Parquet, commit. Tokens before `--skip` are left out, because there
            compiled code is loaded and tables are learnt
    first   CPU seconds that these take more
    MiB     largest resident size, less that of `read`

The dump's numbers are on a grid already; they are moved at random as in bench_storage.py, but
outside the times.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from bench_storage import off_the_grid

from pipeline.dump.plan import COARSE, MIN_PROB
from storage import LogitDataset, ShardWriter, create_dump
from storage.codec.codec import STEPS

CASES = {  # codec, cut-off, step
    "read": None,
    "v1, all entries": ("v1", 0.0, STEPS["v1"]),
    "v3, all entries": ("v3", 0.0, STEPS["v3"]),
    "v3, default": ("v3", MIN_PROB, COARSE),
}


def run(path: Path, name: str, tokens: int, skip: int) -> dict[str, float]:
    """Measure one case in this process."""
    dataset, case, rng = LogitDataset(path, partial=True), CASES[name], np.random.default_rng(0)
    k = max(int(row.topk.counts.max()) for row, _ in zip(dataset, range(9), strict=False))
    spent = done = 0.0
    before = None
    with tempfile.TemporaryDirectory() as folder:
        codec, min_prob, step = case or ("v1", 0.0, STEPS["v1"])
        plan = {"vocab_size": dataset.plan["vocab_size"], "codec": codec, "step": step}
        plan |= {"partitions": 1, "k": k}
        writer = ShardWriter(create_dump(folder, plan).partition(0)) if case else None
        for row in dataset:
            topk = off_the_grid(row.topk, float(dataset.plan["step"]), rng)
            began = time.process_time()
            if writer:
                writer.write(replace(row, topk=topk.cut(min_prob) if min_prob else topk))
            spent += time.process_time() - began
            done += len(row.input_ids)
            if before is None and done >= skip:
                before = spent, done
            if done >= tokens:
                break
        began = time.process_time()
        if writer:
            writer.commit({})
        spent += time.process_time() - began
    assert before is not None, f"{path} has {done:,.0f} tokens; --skip fewer"
    each = (spent - before[0]) / (done - before[1])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"us": 1e6 * each, "first": before[0] - each * before[1], "MiB": memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="DUMP")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="that are written")
    parser.add_argument("--skip", type=int, default=400_000, help="tokens that are not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run(given.path, given.case, given.tokens, given.skip)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(given.rounds):
        for name in CASES:
            command = [sys.executable, *sys.argv, "--case", name]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(answer.stdout))
    print(f"{'':<18}{'us':>8}{'first':>8}{'MiB':>8}   median of {given.rounds}, and range of us")
    read = median(one["MiB"] for one in found.pop("read"))
    for name, results in found.items():
        middle = {key: median(one[key] for one in results) for key in results[0]}
        times = [one["us"] for one in results]
        print(
            f"{name:<18}{middle['us']:8.1f}{middle['first']:8.1f}{middle['MiB'] - read:8.0f}"
            f"   {min(times):.1f} to {max(times):.1f}"
        )


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
