"""SIGINT and SIGTERM end long work at a good point, once, and the exit code says so."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline.config import Interrupted


@contextlib.contextmanager
def stop_on_signals(ask: Callable[[str], bool] = lambda name: False) -> Iterator[None]:
    """Raise Interrupted at SIGINT and SIGTERM, unless `ask`, called with the signal's name, says
    that the work will end by itself. Further signals are ignored: the ending is under way."""

    def stop(number: int, _: FrameType | None) -> None:
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, signal.SIG_IGN)
        name = signal.Signals(number).name
        if not ask(name):
            raise Interrupted(f"stopped by {name}")

    before = {known: signal.signal(known, stop) for known in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
