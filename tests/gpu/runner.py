"""Run the checks of a folder: a process for each file, several at a time, none behind another.

A check that ends its process (a crash, an error of CUDA, too long a time) costs itself alone: the
file's other checks run in a new process. What each one found comes as events (conftest.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from tests.gpu.conftest import EVENTS
from tests.helpers.paths import ROOT

START_SECONDS = 180.0
"""A process may take this long until its first check starts, and to end after the last one."""
LOOK_SECONDS = 0.2
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class Check:
    """A check and what became of it."""

    name: str
    """pytest's node id"""
    about: str
    devices: int
    package: str | None
    seconds: float
    """limit"""
    lacks: str | None
    """what is missing here to run it"""
    result: str | None = None
    """passed, failed or skipped; None: not run"""
    why: str = ""
    measured: list[str] = field(default_factory=list)
    took: float = 0.0

    @property
    def file(self) -> str:
        return self.name.partition("::")[0]

    @property
    def title(self) -> str:
        """Such as "loss kernel: ids outside the vocabulary"."""
        file, _, test = self.name.partition("::")
        words = Path(file).stem, test
        subject, what = (word.removeprefix("test_").replace("_", " ") for word in words)
        return f"{subject}: {what}"

    @property
    def needs(self) -> str:
        devices = f"{self.devices} GPU{'s' if self.devices > 1 else ''}"
        return devices + (f", {self.package}" if self.package else "")

    def end(self, result: str, why: str = "", took: float = 0.0) -> None:
        self.result, self.why, self.took = result, why, took


class Runner:
    """Finds and runs the checks of `folder`, a path below `root`."""

    def __init__(
        self, folder: str, root: Path = ROOT, environment: dict[str, str] | None = None
    ) -> None:
        self.folder, self.root = folder, root
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        self.stop = Event()

    def find(self, only: str = "") -> list[Check]:
        """The checks whose name contains `only`. Raises RuntimeError if pytest cannot read them."""
        with TemporaryDirectory() as scratch:
            process = Process(self, [self.folder], Path(scratch), "--collect-only")
            process.wait(START_SECONDS)
            found = [
                Check(event.pop("check"), **event)
                for event in process.events()
                if event.pop("event") == "found"
            ]
            if process.code not in (0, 5):  # 5: there are none
                raise RuntimeError(f"pytest cannot read {self.folder}:\n{process.tail(40)}")
        return [check for check in found if only in check.name or only in check.title]

    def run(
        self, checks: list[Check], processes: int, ended: Callable[[Check], None], seconds: float
    ) -> None:
        """Run them, `processes` at a time; calls `ended` after each. Stops after `seconds`."""
        give_up = time.monotonic() + seconds
        for check in checks:
            if check.lacks is not None:
                check.end("skipped", check.lacks)
                ended(check)
        files: dict[tuple[str, int], list[Check]] = {}
        for check in checks:
            if check.result is None:
                files.setdefault((check.file, check.devices), []).append(check)
        longest_first = sorted(files.values(), key=lambda some: -max(one.seconds for one in some))
        with ThreadPoolExecutor(processes) as pool:
            jobs = [pool.submit(self.run_file, some, ended, give_up) for some in longest_first]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                self.stop.set()
                raise

    def run_file(self, checks: list[Check], ended: Callable[[Check], None], give_up: float) -> None:
        while left := [check for check in checks if check.result is None]:
            if self.stop.is_set() or time.monotonic() > give_up:
                return
            with TemporaryDirectory() as scratch:
                names, devices = [check.name for check in left], left[0].devices
                process = Process(self, names, Path(scratch), devices=devices)
                try:
                    self.follow(process, left, ended, give_up)
                finally:
                    process.kill()

    def follow(
        self,
        process: "Process",
        checks: list[Check],
        ended: Callable[[Check], None],
        give_up: float,
    ) -> None:
        """Take what the process tells until it ends. The check that it ended in has failed; between
        two checks it may end (conftest.py does that where CUDA is broken), and the others go on."""
        named, seen = {check.name: check for check in checks}, 0
        current, limit, began, between = checks[0], START_SECONDS, time.monotonic(), False
        while True:
            code = process.poll()  # first: what was told before the end is read below
            for event in process.events()[seen:]:
                seen += 1
                check = named.get(event["check"])
                if check is None:
                    continue
                began = time.monotonic()
                if event["event"] == "started":
                    current, limit, between = check, check.seconds, False
                elif event["event"] == "ended":
                    check.measured, limit, between = event["measured"], START_SECONDS, True
                    check.end(event["result"], event["why"], event["seconds"])
                    ended(check)
            if all(check.result for check in checks) or self.stop.is_set():
                return
            took = time.monotonic() - began
            if code is None and took <= limit and time.monotonic() <= give_up:
                time.sleep(LOOK_SECONDS)
                continue
            if not between and time.monotonic() <= give_up:
                why = f"stopped after {limit:.0f} s" if code is None else f"ended with code {code}"
                current.end("failed", f"its process {why}: {process.last_line()}", took)
                ended(current)
            return


class Process:
    """pytest on some checks, in a process group of its own."""

    def __init__(
        self,
        runner: Runner,
        checks: Iterable[str],
        scratch: Path,
        *more: str,
        devices: int | None = None,
    ) -> None:
        """`devices`: how many CUDA devices it sees; None for all."""
        self.told, self.log = scratch / "events", scratch / "log"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [*more, *checks]
        environment = {**runner.environment, EVENTS: str(self.told)}
        if devices is not None:
            seen = environment.get(VISIBLE) or ",".join(map(str, range(devices)))
            environment[VISIBLE] = ",".join(seen.split(",")[:devices])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=runner.root, stdout=log, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        return self.process.returncode

    def poll(self) -> int | None:
        return self.process.poll()

    def wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """End it with all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def events(self) -> list[dict[str, Any]]:
        if not self.told.exists():
            return []
        *lines, _ = self.told.read_text(encoding="utf-8").split("\n")  # the last one may be half
        return [json.loads(line) for line in lines]

    def tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def last_line(self) -> str:
        said = [line for line in self.tail(30).splitlines() if line.strip()]
        return said[-1][:300] if said else "it said nothing"
