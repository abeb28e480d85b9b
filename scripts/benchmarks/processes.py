"""Shared by the benchmarks: run the cases in processes, in turn, and measure time and peak memory.

On a CPU each case has a process of its own, because the peak of the resident set is that of a
process. On a GPU one process runs all cases: the allocator tells the peak of each, and to start
CUDA takes seconds. A case that fails says why in the table, and the others run. Processes are
forked, so that modules are imported once; the benchmark itself never starts CUDA, which would not
work in forked processes any more.
"""

import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]
Run = Callable[[str, int], Result]
"""Runs one case in one round, counted from 0, and returns what was measured."""
WARM_UPS = 2
"""Steps on a GPU that are not measured: they compile kernels and allocate memory."""


def in_turn(
    cases: list[str], rounds: int, run: Run, seconds: float = inf
) -> dict[str, list[Result]]:
    """Run all cases in turn, `rounds` times; returns the results of each case.

    The speed of a machine drifts; in turn, all cases see the same drift. The result is
    {"failed": why} for a case that fails, which does not run in later rounds, and for what is not
    done after `seconds`.
    """
    found: dict[str, list[Result]] = {name: [] for name in cases}
    end = time.monotonic() + seconds
    for number in range(rounds):
        left = [name for name in cases if not failure(found[name])]
        while left:
            now = left if on_gpu() else left[:1]
            results, why = in_child(
                lambda send, now=now, number=number: run_cases(now, number, run, send),  # type: ignore[misc]
                end - time.monotonic(),
            )
            if len(results) < len(now):
                results.append({"failed": why})
            for name, result in zip(now, results, strict=False):
                found[name].append(result)
            left = left[len(results) :]
    return found


def failure(results: list[Result]) -> str | None:
    """Why a case failed; None if it did not."""
    return next((one["failed"] for one in results if "failed" in one), None)


def run_cases(cases: list[str], number: int, run: Run, send: Callable[[Result], None]) -> None:
    """Run the cases in this process, and send the result of each."""
    for name in cases:
        began = time.monotonic()
        try:
            result = run(name, number)
        except torch.OutOfMemoryError:
            result = {"failed": "out of memory"}
        except Exception as error:  # kernels of other projects raise whatever they like
            said = (str(error).strip().splitlines() or [""])[0]
            result = {"failed": f"{type(error).__name__}: {said[:120]}"}
        send(result)
        said = result.get("failed", "done")
        print(f"{name}: {said}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        if not torch.cuda.is_initialized():
            continue
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:  # a kernel broke CUDA in this process; another one runs what is left
            os._exit(1)


def in_child(
    work: Callable[[Callable[[Any], None]], None], seconds: float = inf
) -> tuple[list[Any], str]:
    """Call work(send) in a forked process; returns what it sent, and how the process ended."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=work, args=(sender.send,))
    child.start()
    sender.close()
    sent: list[Any] = []
    end = time.monotonic() + seconds
    try:
        while receiver.poll(None if seconds == inf else max(0, end - time.monotonic())):
            sent.append(receiver.recv())
        child.kill()
        ended = "no time left"
    except EOFError:
        child.join()
        ended = f"its process ended with exit code {child.exitcode}"
    child.join()
    return sent, ended


@cache
def on_gpu() -> bool:
    return bool(in_child(lambda send: send(torch.cuda.is_available()))[0][0])


@cache
def hardware() -> str:
    if not on_gpu():
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    name = in_child(lambda send: send(torch.cuda.get_device_name()))[0][0]
    return f"{name}, torch {torch.__version__}"


def measured(step: Callable[[], Any], repeats: int, device: str) -> Result:
    """Seconds of a step and its peak bytes above what is in use: on a GPU the median by CUDA
    events, after WARM_UPS steps; on a CPU the fastest."""
    if device == "cuda":
        for _ in range(WARM_UPS):
            step()
    before = reset_peak(device)
    times = [seconds_of(step, device) for _ in range(repeats)]
    seconds = statistics.median(times) if device == "cuda" else min(times)
    return {"seconds": seconds, "bytes": peak(device) - before}


def seconds_of(step: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def peak(device: str) -> int:
    """Peak bytes since `reset_peak`: of the allocator on a GPU, of the resident set on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(status("VmHWM")) * 1024


def reset_peak(device: str) -> int:
    """Reset the peak; returns the bytes in use."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status("VmRSS")) * 1024


def status(field: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(field + ":"))
