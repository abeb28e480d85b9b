"""An object store in memory, behind fsspec, on a virtual clock: slow, and not to be relied on.

A request takes its time before and after it is done. It may be lost, or its answer; it may be done
twice, the second time much later; it may be refused, at random or because there are too many; the
machine that sent it may die right before or after it is done. A whole object appears at once, as
on S3.
"""

import contextlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem, register_implementation
from virtual_time import Clock, Seconds

Result = TypeVar("Result")
PAGE = 1000  # objects of a page of a listing


@dataclass(frozen=True)
class Faults:
    """Shares of all requests, and times in seconds."""

    delay: float = 0.1  # of a request, on average
    timeout: float = 20.0  # until a client gives up
    lost: float = 0.005  # requests that never arrive
    unanswered: float = 0.005  # requests that are done, and the answer is lost
    doubled: float = 0.01  # writes and removals that are done again
    again: float = 3600.0  # until then, at most
    refused: float = 0.01
    most: int = 500  # requests in a second; more are refused
    fatal: float = 0.002  # requests at which the machine dies


class Bucket:
    """The objects by name, and what happened to the requests. `watch` sees each change."""

    def __init__(self, clock: Clock, rng: random.Random, faults: Faults) -> None:
        self.clock, self.rng, self.faults = clock, rng, faults
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.folders: dict[str, dict[str, None]] = {}
        self.requests: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()
        self.down_until = 0.0
        self.second, self.in_second = 0, 0
        self.watch: Callable[[str, bytes | None], None] = lambda name, data: None

    def request(self, kind: str, work: Callable[[], Result], pages: int = 1) -> Result:
        """Do `work` for the process that runs, as this store does it; at once outside of one."""
        if self.clock.running is None:
            return work()
        self.clock.check()
        self.requests[kind] += pages
        faults, fate = self.faults, self.fate(kind)
        self.clock.sleep(self.rng.expovariate(2 / faults.delay) * pages)
        if fate == "refused" or self.clock.now < self.down_until or self.too_many():
            self.happened["refused"] += 1
            raise OSError("503: slow down")
        if fate == "lost":
            self.clock.sleep(faults.timeout)
            raise TimeoutError("no answer")
        if fate == "died before":
            self.clock.kill(self.clock.current.machine)
        self.clock.check()
        try:
            return work()
        finally:
            if fate == "doubled":
                self.clock.call(self.rng.uniform(0, faults.again), lambda: self.repeat(work))
            if fate == "died after":
                self.clock.kill(self.clock.current.machine)
            self.clock.sleep(self.rng.expovariate(2 / faults.delay))
            if fate == "unanswered":
                self.clock.sleep(faults.timeout)
                raise TimeoutError("no answer")

    def fate(self, kind: str) -> str | None:
        """What goes wrong with this request."""
        faults, at = self.faults, self.rng.random()
        shares = {
            "refused": faults.refused,
            "lost": faults.lost,
            "unanswered": faults.unanswered,
            "doubled": faults.doubled,
            "died before": faults.fatal / 2,
            "died after": faults.fatal / 2,
        }
        for name, share in shares.items():
            at -= share
            if at < 0:
                if name == "doubled" and kind not in ("PUT", "DELETE"):
                    return None
                if name.startswith("died") and self.clock.current.machine.spared:
                    return None
                self.happened[name] += name != "refused"
                return name
        return None

    def too_many(self) -> bool:
        second = int(self.clock.now)
        self.in_second = self.in_second + 1 if second == self.second else 1
        self.second = second
        return self.in_second > self.faults.most

    def repeat(self, work: Callable[[], Any]) -> None:
        """Nobody gets the answer."""
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            work()

    def put(self, name: str, data: bytes, new: bool) -> None:
        """Raises FileExistsError for an object that must be `new` and is not."""
        if new and name in self.objects:
            raise FileExistsError(name)
        self.objects[name] = data, self.clock.now
        below = name
        while "/" in below:
            folder, _ = below.rsplit("/", 1)
            self.folders.setdefault(folder, {})[below] = None
            below = folder
        self.watch(name, data)

    def remove(self, name: str) -> None:
        del self.objects[found(name, self.objects)]
        folder, _ = name.rsplit("/", 1)
        del self.folders[folder][name]
        self.watch(name, None)

    def below(self, folder: str, prefix: str = "") -> Iterator[str]:
        """The objects in a folder, and in its folders, whose names there begin so."""
        for name in self.folders.get(folder, ()):
            if name in self.folders and name.startswith(f"{folder}/{prefix}"):
                yield from self.below(name)
            elif name.startswith(f"{folder}/{prefix}"):
                yield name

    def info(self, name: str) -> dict[str, Any]:
        if name in self.folders:
            return {"name": name, "type": "directory", "size": 0}
        data, modified = self.objects[found(name, self.objects)]
        when = Seconds.EPOCH + modified
        return {"name": name, "type": "file", "size": len(data), "mtime": when}


def found(name: str, objects: dict[str, Any]) -> str:
    if name not in objects:
        raise FileNotFoundError(name)
    return name


class SimulatedFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """`simulated://…`: the store of `bucket`, which a simulation sets."""

    protocol = "simulated"
    cachable = False
    bucket: Bucket

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        bucket, name = self.bucket, self._strip_protocol(path)
        return bucket.request("GET", lambda: bucket.objects[found(name, bucket.objects)][0])[
            start:end
        ]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        bucket, name = self.bucket, self._strip_protocol(path)
        return bucket.request("HEAD", lambda: bucket.info(name))

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        bucket, name = self.bucket, self._strip_protocol(path)
        bucket.request("PUT", lambda: bucket.put(name, value, new=mode == "create"))

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        Path(lpath).write_bytes(self.cat_file(rpath))

    def rm_file(self, path: str) -> None:
        bucket, name = self.bucket, self._strip_protocol(path)
        bucket.request("DELETE", lambda: bucket.remove(name))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        bucket, folder = self.bucket, self._strip_protocol(path)

        def listed() -> list[dict[str, Any]]:
            return [bucket.info(name) for name in sorted(found_folder(bucket, folder))]

        there = bucket.request("LIST", listed, pages(len(bucket.folders.get(folder, ()))))
        return there if detail else [info["name"] for info in there]

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        prefix: str = "",
        **_: Any,
    ) -> Any:
        assert maxdepth is None
        assert not withdirs
        bucket, folder = self.bucket, self._strip_protocol(path)
        there = bucket.request(
            "LIST",
            lambda: {name: bucket.info(name) for name in sorted(bucket.below(folder, prefix))},
            pages(sum(1 for _ in bucket.below(folder, prefix))),
        )
        return there if detail else list(there)


def found_folder(bucket: Bucket, folder: str) -> dict[str, None]:
    if folder not in bucket.folders:
        raise FileNotFoundError(folder)
    return bucket.folders[folder]


def pages(objects: int) -> int:
    return max(1, math.ceil(objects / PAGE))


register_implementation("simulated", SimulatedFileSystem, clobber=True)
