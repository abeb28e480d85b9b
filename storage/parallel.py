"""Work on many items in several processes; results come in the order of the items."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any, TypeVar

import pyarrow as pa

from storage.errors import StoreError

AHEAD = 4  # items for each process that are begun before the first of them is taken

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  # of a process of in_order


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int = 1
) -> Generator[Result, None, None]:
    """The result of `work` on each item, by `jobs` forked processes; by this one if `jobs` is 1.

    Raises what `work` raises, and StoreError if a process dies. Close it to end the processes early
    (contextlib.closing); they also end with this process.
    """
    jobs = min(jobs, len(items))
    if jobs <= 1:
        yield from map(work, items)
        return
    others, whole = set(active_children()), False
    pool = ProcessPoolExecutor(jobs, get_context("fork"), begin, (work,))
    waiting: deque[Future[Result]] = deque()
    left = iter(items)
    try:
        waiting.extend(pool.submit(do, item) for item in islice(left, AHEAD * jobs))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(do, item) for item in islice(left, 1))
        whole = True
    except BrokenProcessPool:
        raise StoreError(
            f"one of {jobs} processes died: it was killed, or the machine has no memory left. Run "
            "the same command again, with fewer --jobs if it happens again"
        ) from None
    finally:
        for process in [] if whole else set(active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def begin(work: Callable[[Any], Any]) -> None:
    """Start a process: the first one handles Ctrl-C, and none outlives it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    pa.set_cpu_count(1)


def end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def do(item: Any) -> Any:
    return _work(item)
