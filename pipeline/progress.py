"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

from pipeline.foreign import printable

SECONDS = 5.0
REPORT_SECONDS = 0.5
REPORT_TO = "MOL_PROGRESS_FD"  # set by a parent that shows the progress of several processes


class Progress:
    """Shows how many of `total` units are done, with a status text.

    Without a terminal, a thread prints a line every SECONDS even if nothing changed, so that a
    scheduler sees that the process is alive. If REPORT_TO is set, the thread reports to the parent
    instead.
    """

    def __init__(self, total: int = 0, unit: str = "", done: int = 0) -> None:
        self.total, self.unit, self.done, self.first = total, unit, done, done
        self.status = "starting"
        self.make_status: Callable[[], str] | None = None
        self.started = time.monotonic()
        self.shown = 0.0
        self.bar = None
        self.stopped = threading.Event()
        report_to = os.environ.get(REPORT_TO)
        if report_to:
            self._start(self._report, int(report_to))
        elif sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True)
        else:
            self._start(self._print_lines)

    def _start(self, work: Callable[..., None], *arguments: int) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def update(self, done: int, status: Callable[[], str]) -> None:
        """Set the units done; `status` is called only when it is shown."""
        self.make_status = status
        if self.bar is not None:
            self.bar.update(done - self.done)
            now = time.monotonic()
            if now - self.shown > 0.5:
                self.shown = now
                self.bar.set_postfix_str(printable(status()))
        self.done = done

    def begin(self, total: int | None = None, done: int | None = None) -> None:
        """Start the clock; earlier time, such as an engine's start, does not count in the rate."""
        self.total = self.total if total is None else total
        self.done = self.done if done is None else done
        self.started, self.first = time.monotonic(), self.done
        if self.bar is not None:
            self.bar.total, self.bar.initial = self.total, self.done
            self.bar.reset(self.total)
            self.bar.update(self.done)

    def text(self) -> str:
        return self.make_status() if self.make_status else self.status

    def line(self) -> str:
        elapsed = time.monotonic() - self.started
        if not self.total:
            return f"{self.text()}, {elapsed:.0f} s"
        moved = self.done - self.first
        left = ""
        if moved > 0:
            left = f", {elapsed * (self.total - self.done) / moved:.0f} s left"
        return f"{self.done}/{self.total} {self.unit}s, {elapsed:.0f} s{left}: {self.text()}"

    def _print_lines(self) -> None:
        while not self.stopped.wait(SECONDS):
            say(self.line())

    def _report(self, handle: int) -> None:
        """Write one JSON object per line to the parent process."""
        while True:
            ended = self.stopped.wait(REPORT_SECONDS)
            state = {"done": self.done, "total": self.total, "status": self.text()}
            try:
                os.write(handle, (json.dumps(state) + "\n").encode())
            except OSError:
                return  # the parent has closed the pipe
            if ended:
                return

    def close(self) -> None:
        self.stopped.set()
        if self.bar is not None:
            self.bar.close()


def show(text: str) -> None:
    """Print a result. Characters that the output's encoding lacks become ?."""
    encoding = sys.stdout.encoding or "utf-8"
    print(printable(text).encode(encoding, "replace").decode(encoding))


def say(text: str) -> None:
    """Print a message for the user on stderr; results go to files and stdout.

    Foreign text in it, such as a document's id, cannot command the terminal.
    """
    print(printable(text), file=sys.stderr, flush=True)
