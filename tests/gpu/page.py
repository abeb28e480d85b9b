"""The page at the end: the device, the versions, a table of the checks."""

import platform
import subprocess
from functools import cache
from importlib import metadata

from tests.gpu.runner import Check

PACKAGES = ["torch", "triton", "transformers", "accelerate", "vllm", "flash-attn"]
NO_DEVICE = "no NVIDIA device"


@cache
def devices() -> list[tuple[str, str, int]]:
    """(name, driver, MiB) of each NVIDIA device; empty where nvidia-smi is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
    try:
        said = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if said.returncode != 0:
        return []
    found = []
    for line in said.stdout.splitlines():
        name, driver, size = (word.strip() for word in line.split(","))
        found.append((name, driver, int(size) if size.isdigit() else 0))
    return found


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def counts(checks: list[Check]) -> dict[str, int]:
    """How many passed, failed and were not run."""
    results = [check.result for check in checks]
    passed, failed = results.count("passed"), results.count("failed")
    return {"passed": passed, "failed": failed, "not run": len(checks) - passed - failed}


def page(checks: list[Check], seconds: float, rehearsed: bool) -> str:
    """Markdown."""
    there = [f"{name}, {size:,} MiB, driver {driver}" for name, driver, size in devices()]
    rows = [["device", "; ".join(there) or NO_DEVICE], *map(list, versions().items())]
    total = ", ".join(f"{count} {what}" for what, count in counts(checks).items())
    title = "# GPU check" + (": a rehearsal on the CPU" if rehearsed else "")
    lines = [title, "", f"{total}, in {seconds:.0f} s.", ""]
    lines += table(["", ""], rows)
    lines += ["", *table(["check", "result", "measured (and its bound)", "s"], map(row, checks))]
    return "\n".join(lines) + "\n"


def row(check: Check) -> list[str]:
    result = check.result or "not run"
    if result == "failed":
        return [check.title, "**failed**", "; ".join([check.why, *check.measured]), took(check)]
    if result == "passed":
        return [check.title, "passed", "; ".join(check.measured), took(check)]
    return [check.title, "not run", check.why or "no time was left", ""]


def took(check: Check) -> str:
    return f"{check.took:.1f}"


def listing(checks: list[Check]) -> str:
    """The checks without running them: what each shows, what it needs, whether it can run here."""
    rows = [
        [check.title, check.about, check.needs, check.lacks or "can run here"] for check in checks
    ]
    return "\n".join(table(["check", "shows", "needs", "here"], rows)) + "\n"


def table(head: list[str], rows: object) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]  # type: ignore[misc]
    return ["| " + " | ".join(cell(text) for text in line) + " |" for line in lines]


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
