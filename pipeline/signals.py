"""Stop long work cleanly on SIGINT and SIGTERM, and end a process when its parent dies."""

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
    """Raise Interrupted on SIGINT or SIGTERM, and ignore all later ones.

    If `ask`, called with the signal's name, returns True, the work ends by itself and nothing is
    raised. `limit` seconds after the signal the process exits in any case, with code INTERRUPTED.
    """

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
    """Have the kernel send this process a signal when its parent dies (Linux only).

    Does nothing under nohup, which asks for the opposite. For the kernel, the parent is the thread
    that started the process: a launcher must use a thread that lives as long as the work.
    """
    if sys.platform != "linux" or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # the parent died before the call
        os.kill(os.getpid(), number)
