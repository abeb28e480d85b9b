"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS = 5.0


class Progress:
    """Counts units done of a total and shows them with a status text.

    Off a terminal a thread prints a line every SECONDS, also while nothing moves, so that a
    scheduler sees that the process lives.
    """

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        self.total, self.unit, self.done, self.first = total, unit, done, done
        self.status = "starting"
        self.started = time.monotonic()
        self.bar = None
        self.stopped = threading.Event()
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True)
        else:
            threading.Thread(target=self._print_lines, daemon=True).start()

    def update(self, done: int, status: Callable[[], str]) -> None:
        """Set the units done; `status` is called only when it is going to be shown."""
        self.make_status = status
        if self.bar is not None:
            self.bar.update(done - self.done)
            now = time.monotonic()
            if now - getattr(self, "shown", 0) > 0.5:
                self.shown = now
                self.bar.set_postfix_str(status())
        self.done = done

    def begin(self) -> None:
        """Start the clock: what came before (an engine's start) is not counted in the rate."""
        self.started, self.first = time.monotonic(), self.done

    def line(self) -> str:
        status = self.make_status() if hasattr(self, "make_status") else self.status
        elapsed = time.monotonic() - self.started
        moved = self.done - self.first
        left = ""
        if moved:
            left = f", {elapsed * (self.total - self.done) / moved:.0f} s left"
        return f"{self.done}/{self.total} {self.unit}s, {elapsed:.0f} s{left}: {status}"

    def _print_lines(self) -> None:
        while not self.stopped.wait(SECONDS):
            print(self.line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        self.stopped.set()
        if self.bar is not None:
            self.bar.close()


def say(text: str) -> None:
    """A line for the person who started this; results go to files and stdout, talk to stderr."""
    print(text, file=sys.stderr, flush=True)
