"""Shared by the benchmarks: run each case in its own process, in turn, and measure peak memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def in_turn(cases: list[str], rounds: int, once: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Run this script with `--case NAME` for all cases in turn, `rounds` times; returns the JSON
    that each run prints.

    The speed of a machine drifts; in turn, all cases see the same drift. `once` holds options for
    all rounds but the first. They turn off what need not be measured again.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in cases:
            again = [word for option in once.items() for word in option] if number else []
            command = [sys.executable, *sys.argv, *again, "--case", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


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
