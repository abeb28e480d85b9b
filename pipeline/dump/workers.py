"""Run the partitions of one dump on one node, N at a time, with one progress display.

Each partition is its own process: the same script with --partition I/N. A failed partition is
retried while the others continue. If this process dies, all of its workers end.
"""

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import BAD_INPUT, DONE, REFUSED, ConfigError, FailedError
from pipeline.progress import REPORT_TO, Progress, say

ATTEMPTS = 3  # per partition
STOP_SECONDS = 90.0  # from SIGTERM until a worker is killed
FINAL = {BAD_INPUT, REFUSED}  # exit codes that a retry cannot change


@dataclass
class Worker:
    """A running partition and its last report."""

    slot: int
    partition: int
    process: "subprocess.Popen[bytes]"
    reports: int
    buffer: bytes = b""
    state: dict[str, Any] = field(default_factory=dict)

    def read(self) -> None:
        """Read its new reports; keep the last complete one."""
        with contextlib.suppress(BlockingIOError):
            self.buffer += os.read(self.reports, 1 << 16)
        *lines, self.buffer = self.buffer.split(b"\n")
        if lines:
            self.state = json.loads(lines[-1])


class Pool:
    """Runs each partition in a worker process, a limited number at a time."""

    def __init__(
        self, command: list[str], partitions: list[int], of: int, workers: int, devices: int
    ) -> None:
        for slot in range(workers):
            visible_devices(slot, devices)  # raises before any worker has started
        self.command, self.of, self.devices = command, of, devices
        self.waiting = deque(partitions)
        self.attempts = dict.fromkeys(partitions, 0)
        self.free = list(range(workers))
        self.running: list[Worker] = []
        self.finished: dict[int, dict[str, Any]] = {}
        self.failed: dict[int, int] = {}
        self.selector = selectors.DefaultSelector()

    def run(self, progress: Progress) -> None:
        """Run all partitions. Raises FailedError at the end if one of them failed for good."""
        try:
            while self.waiting or self.running:
                while self.waiting and self.free:
                    self.start(self.waiting.popleft(), self.free.pop(0))
                for key, _ in self.selector.select(timeout=0.5):
                    key.data.read()
                for worker in [w for w in self.running if w.process.poll() is not None]:
                    self.end(worker)
                self.show(progress)
        finally:
            self.stop()
        if self.failed:
            codes = ", ".join(f"{part} (exit code {code})" for part, code in self.failed.items())
            raise FailedError(f"partitions failed: {codes}; see their messages above")

    def start(self, partition: int, slot: int) -> None:
        self.attempts[partition] += 1
        reports, write = os.pipe()
        os.set_blocking(reports, False)
        environment = {**os.environ, REPORT_TO: str(write), **visible_devices(slot, self.devices)}
        words = [*self.command, "--workers=1", "--partition", f"{partition}/{self.of}"]
        # From the main thread: the workers die with the thread that started them.
        process = subprocess.Popen(words, env=environment, pass_fds=[write])
        os.close(write)
        worker = Worker(slot, partition, process, reports)
        self.running.append(worker)
        self.selector.register(reports, selectors.EVENT_READ, worker)

    def end(self, worker: Worker) -> None:
        worker.read()
        self.running.remove(worker)
        self.free.append(worker.slot)
        self.selector.unregister(worker.reports)
        os.close(worker.reports)
        code, partition = worker.process.returncode, worker.partition
        if code == DONE:
            self.finished[partition] = worker.state
        elif code in FINAL or self.attempts[partition] >= ATTEMPTS:
            self.failed[partition] = code
            say(f"partition {partition}: failed with exit code {code}; no further retry")
        else:
            say(f"partition {partition}: ended with exit code {code}; retrying")
            self.waiting.append(partition)

    def show(self, progress: Progress) -> None:
        states = [*self.finished.values(), *(worker.state for worker in self.running)]
        progress.total = sum(state.get("total", 0) for state in states)
        progress.update(sum(state.get("done", 0) for state in states), self.status)

    def status(self) -> str:
        parts = [
            f"[{worker.partition}] {worker.state.get('status', 'starting')}"
            for worker in sorted(self.running, key=lambda worker: worker.partition)
        ]
        done = f"{len(self.finished)} of {len(self.attempts)} partitions done"
        return "; ".join([done, *parts])

    def stop(self) -> None:
        """Terminate all running workers; kill those that still run after STOP_SECONDS."""
        for worker in self.running:
            worker.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self.running:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def visible_devices(slot: int, devices: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for a slot: its `devices` GPUs of those visible here; empty without GPU.

    Raises ConfigError if there are too few GPUs.
    """
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        seen = given.split(",")
    elif torch.cuda.device_count():  # does not initialise CUDA
        seen = [str(number) for number in range(torch.cuda.device_count())]
    else:
        return {}
    mine = seen[slot * devices : (slot + 1) * devices]
    if len(mine) < devices:
        raise ConfigError(
            f"workers: {slot + 1} engines of {devices} GPUs each need {(slot + 1) * devices}, "
            f"found {len(seen)}"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
