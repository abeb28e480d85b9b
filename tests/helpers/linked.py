"""Dumps of thousands of shards that are links to one file, and a file system that counts."""

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from storage import Dump, row_head, shard_reader
from storage.parsing import to_json

FIRST = "00000/00000"


def link_shards(path: Path, shards: int, partition: int | None = None) -> Dump:
    """Add links to the first shard of an unfinished dump until a partition has `shards`.

    Without `partition` it is the first one, and the dump is finished. Read it within
    `names_ignored`: each file still says that it is the first shard.
    """
    dump, folder = Dump(path), path / f"{partition or 0:05d}"
    folder.mkdir(exist_ok=True)
    first = dump.partition(0).shard(0)
    for number in range(0 if partition else 1, shards):
        marker = {**first.marker, "file": f"{number:05d}-{number:012x}.parquet"}
        for ending in (".parquet", ".index"):
            source = path / first.file.replace(".parquet", ending)
            if source.exists():
                os.link(source, folder / marker["file"].replace(".parquet", ending))
        (folder / f"{number:05d}.json").write_bytes(to_json(marker))
    if partition is None:
        dump.partition(0).finish({})
        dump.finish()
    return dump


@contextlib.contextmanager
def names_ignored() -> Iterator[None]:
    """Readers take any shard for the first one."""
    check_metadata, check = shard_reader.check_metadata, getattr(row_head, "RowHead", None)
    own = check and check.check

    def any_file(metadata: Any, shard: Any, dump: Any) -> str:
        return check_metadata({**metadata, b"shard": shard.name.encode()}, shard, dump)

    shard_reader.check_metadata = any_file
    if check:
        check.check = lambda self, shard, *rest: own(self, FIRST, *rest)
    try:
        yield
    finally:
        shard_reader.check_metadata = check_metadata
        if check:
            check.check = own


class Counted(AbstractFileSystem):
    """Local files behind the interface of a remote store. `requests` and `bytes` count."""

    protocol = "counted"
    cachable = False
    requests: ClassVar[Counter[str]] = Counter()
    bytes = 0
    lock = threading.Lock()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.files = LocalFileSystem()

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        with Counted.lock:
            Counted.requests["GET"] += 1
        data: bytes = self.files.cat_file(path, start, end)
        with Counted.lock:
            Counted.bytes += len(data)
        return data

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        Counted.requests["HEAD"] += 1
        found: dict[str, Any] = self.files.info(path)
        return found

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        Counted.requests["LIST"] += 1
        return self.files.ls(path, detail, **options)

    def find(self, path: str, **options: Any) -> Any:
        Counted.requests["LIST"] += 1
        return self.files.find(path, **options)

    def get_file(self, path: str, target: str, **_: Any) -> None:
        Counted.requests["GET"] += 1
        Counted.bytes += os.path.getsize(path)
        self.files.get_file(path, target)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        Counted.requests["PUT"] += 1
        with open(path, "xb" if mode == "create" else "wb") as file:
            file.write(value)

    @classmethod
    def reset(cls) -> None:
        cls.requests, cls.bytes = Counter(), 0


class Meeting(Counted):
    """A store that answers requests for ranges once as many as `barrier` has parties wait."""

    protocol = "meeting"
    barrier: threading.Barrier | None = None

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        if Meeting.barrier and start is not None:
            Meeting.barrier.wait(timeout=30)
        return super().cat_file(path, start, end, **options)


fsspec.register_implementation("counted", Counted, clobber=True)
fsspec.register_implementation("meeting", Meeting, clobber=True)


def counted(path: Path) -> str:
    """The address of a local folder on the counting file system."""
    Counted.reset()
    return f"counted://{path}"


def row_bytes(path: Path) -> float:
    """Bytes of a shard's data file for each of its rows, on average over the dump."""
    shards = json.loads((path / "manifest.json").read_text())["shards"]
    return sum(s["bytes"] for s in shards) / sum(s["rows"] for s in shards)
