"""Check this machine's GPU: python -m tests.gpu [--list] [--only NAME]; `make gpu-check`.

Exit codes: 0 what ran is right, 1 something failed or had no time, 2 there is nothing to run, 75
interrupted.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from tests.gpu.device import REHEARSAL
from tests.gpu.page import devices, listing, page
from tests.gpu.runner import Check, Runner

FOLDER = "tests/gpu"
PAGE = Path("runs/gpu-check.md")
MIB_EACH = 18_000
"""Memory of the card for each process at a time."""


def main(arguments: list[str] | None = None, runner: Runner | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the checks, run none")
    parser.add_argument("--only", default="", help="run the checks whose name contains this")
    parser.add_argument("--processes", type=int, help="at a time; by the card's memory by default")
    parser.add_argument("--minutes", type=float, default=10, help="stop after this time")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page is written")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at small sizes")
    given = parser.parse_args(arguments)
    processes = given.processes or at_a_time()
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    if given.rehearse:
        environment[REHEARSAL] = "1"
    runner = runner or Runner(FOLDER)
    runner.environment |= environment
    checks = runner.find(given.only)
    if not checks:
        print(f"--only {given.only}: no check has this in its name; see --list", file=sys.stderr)
        return 2
    if given.list:
        print(listing(checks), end="")
        return 0
    return run(runner, checks, processes, given)


def run(runner: Runner, checks: list[Check], processes: int, given: argparse.Namespace) -> int:
    began, code = time.monotonic(), None
    given.page.parent.mkdir(parents=True, exist_ok=True)

    def ended(check: Check) -> None:
        done = sum(check.result is not None for check in checks)
        result = "not run" if check.result == "skipped" else check.result
        line = f"{done}/{len(checks)} {check.title}: {result} ({check.took:.1f} s) {check.why}"
        print(line.rstrip(), file=sys.stderr, flush=True)
        write()

    def write() -> str:
        text = page(checks, time.monotonic() - began, given.rehearse)
        given.page.write_text(text, encoding="utf-8")
        return text

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    try:
        runner.run(checks, processes, ended, 60 * given.minutes)
    except KeyboardInterrupt:
        code = 75
    finally:
        signal.signal(signal.SIGTERM, before)
    print(write(), end="", flush=True)
    return exit_code(checks) if code is None else code


def exit_code(checks: list[Check]) -> int:
    results = {check.result for check in checks}
    if results == {"skipped"}:
        return 2  # nothing could be checked: that is no success
    return 1 if results & {"failed", None} else 0


def at_a_time() -> int:
    """Processes that fit on the smallest card; 1 without one."""
    sizes = [size for _, _, size in devices()]
    return min(4, max(1, min(sizes, default=0) // MIB_EACH))


if __name__ == "__main__":
    sys.exit(main())
