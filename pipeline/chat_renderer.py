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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import FailedError
from pipeline.types import Json

CPU_SECONDS = 10  # of one rendering
CHAT_SECONDS = 60  # of the beginnings of one chat
MEMORY = 1 << 30  # bytes, beside what the process takes at its start
LONGEST = 16 << 20  # characters of a rendered chat
PROGRAM = Path(__file__).with_name("chat_process.py")


class CannotRender(ValueError):
    """What the template said, or what it broke."""


Beginning = tuple[int, bool]
"""The first messages of a chat: their number, and whether the generation prompt follows them."""


@dataclass(frozen=True)
class Part:
    """The rendering of a beginning, beside that of the whole chat."""

    same: int
    """Characters that both begin with."""
    rest: str
    """What follows them in the part alone; empty where the whole begins with the part."""


@dataclass(frozen=True)
class Rendering:
    text: str
    marks: list[tuple[int, int]] | None
    """Characters [start, stop) within the template's generation markers, if they were asked for;
    None where it has none, or where they do not say where they are (within a macro)."""
    parts: dict[Beginning, Part | CannotRender]


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

    def render(
        self,
        template: Json,
        messages: list[Json],
        tools: list[Json] | None = None,
        beginnings: Sequence[Beginning] = (),
        marked: bool = False,
    ) -> Rendering:
        """Render messages, and beginnings of them.

        `template` has `source`, the `given` names, and `now` for a clock; `marked` asks for the
        places of its generation markers. Raises CannotRender, and FailedError where the process
        does not start.
        """
        if self.owner != os.getpid():
            self.forget()
        job = {
            "messages": messages, "tools": tools, "beginnings": beginnings, "marked": marked
        }  # fmt: skip
        with self.lock:
            try:
                answer = self.ask(template, job)
            except BaseException:  # an answer may be on its way, which the next job must not get
                self.stop()
                raise
        if "text" not in answer:
            raise CannotRender(answer["error"])
        parts = [
            CannotRender(part["error"]) if "error" in part else Part(part["same"], part["rest"])
            for part in answer["beginnings"]
        ]
        marks = answer["marks"] and [(start, stop) for start, stop in answer["marks"]]
        return Rendering(answer["text"], marks, dict(zip(beginnings, parts, strict=True)))

    def ask(self, template: Json, job: Json) -> Json:
        if self.process is None:
            limits = map(str, (CPU_SECONDS, CHAT_SECONDS, MEMORY, LONGEST))
            command = [sys.executable, "-P", str(PROGRAM), *limits]
            pipe = subprocess.PIPE
            self.process, self.template = subprocess.Popen(command, stdin=pipe, stdout=pipe), None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        jobs = [job] if template is self.template else [template, job]
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"".join(json.dumps(each).encode() + b"\n" for each in jobs))
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
