"""Renders chats in a process of its own, with bounds on time and memory (chat_process.py).

A signal would reach the main thread alone, and no thread can stop another one inside of 10**10**10.
One process serves all templates of this one. It starts with the first chat, which takes seconds.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from pipeline.errors import FailedError
from pipeline.types import Json

CPU_SECONDS = 10  # of one chat
MEMORY = 1 << 30  # bytes, beside what the process takes at its start
LONGEST = 16 << 20  # characters of a rendered chat
PROGRAM = Path(__file__).with_name("chat_process.py")


class CannotRender(ValueError):
    """What the template said, or what it broke."""


class Renderer:
    """Thread-safe; a forked process starts its own."""

    def __init__(self) -> None:
        self.forget()
        atexit.register(self.stop)

    def forget(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.template: Json | None = None  # that the process has now
        self.owner = os.getpid()

    def render(self, template: Json, messages: list[Json]) -> str:
        """The text of messages. `template` has `source`, the `given` names, and `now` for a clock.

        Raises CannotRender, and FailedError where the process does not start.
        """
        if self.owner != os.getpid():
            self.forget()
        with self.lock:
            try:
                answer = self.ask(template, messages)
            except BaseException:  # an answer may be on its way, which the next job must not get
                self.stop()
                raise
        if "text" not in answer:
            raise CannotRender(answer["error"])
        return str(answer["text"])

    def ask(self, template: Json, messages: list[Json]) -> Json:
        if self.process is None:
            limits = map(str, (CPU_SECONDS, MEMORY, LONGEST))
            command = [sys.executable, "-P", str(PROGRAM), *limits]
            pipe = subprocess.PIPE
            self.process, self.template = subprocess.Popen(command, stdin=pipe, stdout=pipe), None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        jobs = [] if template is self.template else [template]
        jobs.append({"messages": messages})
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"".join(json.dumps(job).encode() + b"\n" for job in jobs))
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self.broken(self.process)
        self.template = template
        answer: Json = json.loads(line)
        return answer

    def broken(self, process: subprocess.Popen[bytes]) -> CannotRender | FailedError:
        code = process.wait()
        if code >= 0:
            return FailedError(f"the process that renders chats ended with exit code {code}")
        if code == -signal.SIGPROF:
            return CannotRender(f"it takes more than {CPU_SECONDS} s of CPU time")
        return CannotRender(f"it ended its process ({signal.Signals(-code).name})")

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


RENDERER = Renderer()
