"""SIGINT and SIGTERM end long work at a good point, once, and the exit code says so; and a process
does not outlive the one that started it."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline.errors import INTERRUPTED, Interrupted

PR_SET_PDEATHSIG = 1  # prctl(2)


@contextlib.contextmanager
def stop_on_signals(
    ask: Callable[[str], bool] = lambda name: False, limit: float | None = None
) -> Iterator[None]:
    """Raise Interrupted at SIGINT and SIGTERM, unless `ask`, called with the signal's name, says
    that the work will end by itself. Further signals are ignored: the ending is under way. With a
    `limit` in seconds the process ends then in any case, with the same exit code."""

    def stop(number: int, _: FrameType | None) -> None:
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, signal.SIG_IGN)
        if limit is not None:
            timers.append(threading.Timer(limit, os._exit, [INTERRUPTED]))
            timers[0].daemon = True
            timers[0].start()
        name = signal.Signals(number).name
        if not ask(name):
            raise Interrupted(f"stopped by {name}")

    timers: list[threading.Timer] = []
    before = {known: signal.signal(known, stop) for known in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        for known, handler in before.items():
            signal.signal(known, handler)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when the one that started it dies (Linux).

    Not under nohup, which says that this is not wanted. The kernel means the thread that started
    the process: a launcher must start it from a thread that lives as long as the work.
    """
    if sys.platform != "linux" or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), number)
