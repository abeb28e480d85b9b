"""Kill a dump again and again, at random instants and inside the steps of a commit.

Every attempt is a process that runs scripts/dump_logits.py as a user would. To start in
milliseconds, it is forked from this process, which has imported everything and done nothing else.

    python -m tests.helpers.kills --kills 200 --seed 0 --codec v3
"""

import argparse
import contextlib
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.paths import SCRIPTS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch

import pipeline.dump.dump  # noqa: F401  imported here so that the attempts start fast
from storage import Dump, IncompleteDump, LogitDataset, verify
from storage.dump_tables import tables_file
from storage.gc import leftovers, remove
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import tiny_model

SCRIPT = SCRIPTS / "dump_logits.py"
STEPS = {"fsync": 4, "replace": 1, "link": 1, "unlink": 1, "chmod": 1}
"""Functions of `os`, and how often a commit calls each."""


def start(arguments: list[str], log: Path, die_at: tuple[str, int] | None = None) -> int:
    """Run the script in a forked process; returns its id.

    With `die_at` = (step, n) it kills itself at the n-th call of os.<step>: before the call if n is
    odd, after it if n is even.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if die_at:
            plant(*die_at)
        torch.set_num_threads(1)
        sys.argv = [str(SCRIPT), *arguments]
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def plant(step: str, calls: int) -> None:
    original, left = getattr(os, step), [calls]

    def counted(*arguments: Any, **named: Any) -> Any:
        if not str(arguments[0]).endswith((".arrow", ".lock")):
            left[0] -= 1
        if left[0] <= 0 and calls % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **named)
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, step, counted)


@dataclass
class Result:
    """Counts of a run of kills; rows are compared with those of an undisturbed dump."""

    kills: int = 0
    in_commit: int = 0
    second_writer: int = 0
    orphans: int = 0
    attempts: int = 0
    rows: int = 0
    shards: int = 0
    lost: int = 0
    doubled: int = 0
    torn: int = 0
    strays: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.in_commit} inside a step of a commit, {self.second_writer} "
            f"with a second live writer on the partition, {self.orphans} of which lived on into "
            f"the next attempt) in {self.attempts} attempts, {self.seconds:.0f} s\n"
            f"{self.rows} rows in {self.shards} shards: lost {self.lost}, doubled {self.doubled}, "
            f"torn {self.torn}; {self.strays} stray files, none of them read, all removed by gc"
        )


def content(path: Path) -> list[tuple[tuple[str, int], bytes]]:
    """Key and content of every row, in order."""
    found = []
    for record in LogitDataset(path):
        topk = record.topk
        ids, at = record.input_ids, record.positions
        parts = [ids, at, topk.counts, topk.ids, topk.logprobs, topk.tail_logprob]
        data = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        found.append(((record.doc_id, record.chunk), data))
    return found


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def committed(path: Path) -> int:
    """Number of committed shards of partition 0."""
    return len(list(path.glob("00000/[0-9]*.json")))


def run(
    folder: Path,
    kills: int,
    seed: int,
    documents: int | None = None,
    positions: float = 1.0,
    codec: str = "v1",
) -> Result:
    """Dump a corpus undisturbed, then again with `kills` kills, and compare the rows.

    `positions` is the share of the targets that the dump keeps.

    If a dump finishes before all kills are done, it is compared and another one begins. Raises
    AssertionError if an attempt fails by itself or a committed row changes.
    """
    rng = random.Random(seed)
    result = Result()
    model = tiny_model(folder / "model")
    documents = documents or 300 + 60 * kills  # an idle machine dumps 44 between two kills
    corpus = write_texts(folder / "corpus.jsonl", some_texts(documents))
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")

    def arguments(output: Path) -> list[str]:
        given = [f"--model={model}", f"--corpus.path={corpus}", f"--output={output}"]
        given += ["--k=8", "--max_length=100", "--engine=transformers", f"--codec={codec}"]
        return [*given, f"--shard_tokens={150 * positions:.0f}", f"--positions={positions}"]

    log = folder / "log.txt"
    assert wait(start(arguments(folder / "undisturbed"), log)) == 0, log.read_text()[-2000:]
    expected = content(folder / "undisturbed")
    assert expected
    output = folder / "killed"
    orphans: list[int] = []
    began = time.monotonic()
    prefix = 0
    while result.kills < kills:
        result.attempts += 1
        die_at = None
        if rng.random() < 0.5:
            step = rng.choice(list(STEPS))
            die_at = (step, rng.randint(1, 8 * STEPS[step]))
        before = committed(output)
        pid = start(arguments(output), log, die_at)
        others = [start(arguments(output), log)] if rng.random() < 0.25 else []
        # Without `die_at`, the kill comes after a random time, or just after one of the next
        # shards.
        deadline = time.monotonic() + (30 if die_at else rng.uniform(0.05, 3))
        target = output / "00000" / f"{before + rng.randint(1, 8):05d}.json"
        code = None
        while code is None and time.monotonic() < deadline:
            if target.exists() and not die_at:
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.002)
            code = ended(pid)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
        elif code != 0:
            result.in_commit += 1
        for orphan in orphans:  # from the attempt before
            end(orphan)
        if code == 0:
            for other in others:
                end(other)
            compare(expected, output, result)
            output, orphans, prefix = folder / f"killed-{result.attempts}", [], 0
            continue
        assert code == -signal.SIGKILL, f"exit code {code}: {log.read_text()[-3000:]}"
        result.kills += 1
        result.second_writer += bool(others or orphans)
        orphans = others
        result.orphans += len(orphans)
        with contextlib.suppress(IncompleteDump):
            rows = len(LogitDataset(output, partial=True))
            assert rows >= prefix, "a committed row is gone"
            prefix = rows
    for orphan in orphans:
        end(orphan)
    assert wait(start(arguments(output), log)) == 0, log.read_text()[-3000:]
    result.seconds = time.monotonic() - began
    compare(expected, output, result)
    return result


def end(pid: int) -> None:
    """Kill a process, which may have ended by itself, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait(pid)


def compare(expected: list[tuple[tuple[str, int], bytes]], output: Path, result: Result) -> None:
    report = verify(output)
    found = content(output)
    result.rows += len(found)
    result.shards += len(Dump(output).shards())
    keys = [key for key, _ in found]
    doubled = len(keys) - len(set(keys))
    lost = len({key for key, _ in expected} - set(keys))
    right = dict(expected)
    torn = sum(right.get(key) != data for key, data in found) + len(report.faults)
    assert (found == expected) == (doubled == lost == torn == 0)
    result.doubled, result.lost, result.torn = (
        result.doubled + doubled,
        result.lost + lost,
        result.torn + torn,
    )
    left = leftovers(output, hours=0)
    result.strays += len(left)
    remove(output, left)
    named = {shard.file for shard in Dump(output).shards()}
    data_files = {str(path.relative_to(output)) for path in output.rglob("*.parquet")}
    assert data_files == named
    assert {path.name for path in output.glob("tables-*")} == {
        tables_file(shard.tables) for shard in Dump(output).shards() if shard.tables
    }
    assert not [path for path in output.rglob(".*") if path.is_file()]
    assert content(output) == found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--positions", type=float, default=1.0, help="share of the targets kept")
    parser.add_argument("--codec", default="v1")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            Path(folder), given.kills, given.seed, positions=given.positions, codec=given.codec
        )
    print(result)
    return 0 if result.lost == result.doubled == result.torn == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
