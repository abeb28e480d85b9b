"""Threads beside the engine: one reads ahead of it, one writes behind it.

Both queues are bounded, so memory does not grow with the corpus. An exception in a thread is raised
again in the thread that uses it. The work in both (the tokenizer, zstandard, numpy, Parquet, fsync)
releases the GIL.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
POLL = 0.1  # seconds between two checks for a stop
GRACE = 10.0  # seconds that a thread has to finish its last item after a stop


@contextlib.contextmanager
def ahead(items: Iterable[Item], size: int) -> Iterator[Iterator[Item]]:
    """Iterator over `items`; a thread makes them, at most `size` in advance."""
    made: queue.Queue[tuple[str, object]] = queue.Queue(size)
    stopped = threading.Event()

    def put(kind: str, value: object) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return made.put((kind, value), timeout=POLL)

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    def taken() -> Iterator[Item]:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value  # type: ignore[misc]
            yield value  # type: ignore[misc]

    thread = threading.Thread(target=make, name="reading ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped.set()
        thread.join(GRACE)


class Behind(Generic[Item]):
    """Calls `work(item)` in a thread, in order; the waiting items weigh at most `limit` together.

        with Behind(writer.write, limit=100_000) as behind:
            behind.put(item, weight)

    A normal exit waits for all items. An exception in the block discards the waiting items. An
    exception in the thread is raised by the next `put`, or at the exit.
    """

    def __init__(self, work: Callable[[Item], None], limit: int) -> None:
        self.work, self.limit = work, limit
        self.items: list[tuple[Item, int]] = []
        self.weight = 0
        self.ended = self.dropped = False
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="writing behind", daemon=True)

    def put(self, item: Item, weight: int) -> None:
        """Queue an item; waits while the queue would weigh more than `limit`."""
        with self.changed:
            while self.error is None and self.weight and self.weight + weight > self.limit:
                self.changed.wait()
            if self.error is not None:
                raise self.error
            self.items.append((item, weight))
            self.weight += weight
            self.changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self.changed:
                    while not (self.items or self.ended):
                        self.changed.wait()
                    if self.dropped or not self.items:
                        return
                    item, weight = self.items.pop(0)
                self.work(item)
                with self.changed:
                    self.weight -= weight
                    self.changed.notify_all()
        except BaseException as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def __enter__(self) -> "Behind[Item]":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(drop=kind is not None)
        if kind is not None:
            self.thread.join(GRACE)
            return
        try:
            self.thread.join()
        except BaseException:  # a signal: discard the waiting items
            self._end(drop=True)
            self.thread.join(GRACE)
            raise
        if self.error is not None:
            raise self.error

    def _end(self, drop: bool) -> None:
        with self.changed:
            self.ended, self.dropped = True, drop
            self.changed.notify_all()

    @property
    def running(self) -> bool:
        return self.thread.is_alive()
