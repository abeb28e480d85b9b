"""The bytes of a committed data file, for readers: mapped where it is local; else from a local
cache or, without one, in ranges.

The cache is for training, which comes back to every shard. Set MOL_CACHE to a directory;
MOL_CACHE_GB (default 100) bounds it. Files are kept by their sha256, which the marker names, so a
cached file can be neither stale nor half there, and processes share them: each is made under a
name of its own and renamed.
"""

import contextlib
import hashlib
import io
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.errors import CorruptShard
from storage.manifest import Shard
from storage.store import Store

FOLDER, LIMIT_GB = "MOL_CACHE", "MOL_CACHE_GB"


def open_source(store: Store, shard: Shard) -> Any:
    """What pyarrow reads a shard's data file from.

    Raises FileNotFoundError where there is none, CorruptShard where the store holds another file
    than was committed, StoreError where the store cannot be read.
    """
    if store.local:  # mapped: row groups are read without copying the file
        return pa.memory_map(store / shard.file)
    path = cached(store, shard.file, shard.marker["sha256"])
    if path is not None:
        return pa.memory_map(str(path))
    size = int(store.attempt("read", shard.file, lambda: store.fs.info(store / shard.file)["size"]))
    return pa.PythonFile(RangeFile(store, shard.file, size), mode="r")


class RangeFile(io.RawIOBase):
    """A remote file read in ranges, each tried again while the store fails for a time."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self.store, self.name, self.size, self.at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        start = self.at
        stop = self.size if size is None or size < 0 else min(start + size, self.size)
        if stop <= start:
            return b""

        def fetch() -> bytes:
            data: bytes = self.store.fs.cat_file(self.store / self.name, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came of {stop - start}")
            return data

        data = self.store.attempt("read", self.name, fetch)
        self.at = stop
        return data


def cached(store: Store, name: str, sha256: str) -> Path | None:
    """The local copy of a file of this store, fetched if need be; None where there is no cache.

    Raises CorruptShard where what the store holds has another sha256, StoreError where it cannot
    be read, FileNotFoundError where there is none.
    """
    folder = os.environ.get(FOLDER)
    if store.local or not folder:
        return None
    path = Path(folder) / f"{sha256}.parquet"
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)  # the least recently used go first
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".fetching-{uuid.uuid4().hex}")
    try:
        store.attempt("read", name, lambda: store.fs.get_file(store / name, str(own)))
        with own.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise CorruptShard(
                f"{name}: sha256 differs from the marker's: the file was changed after commit"
            )
        make_room(path.parent, own.stat().st_size)
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)
    return path


def make_room(folder: Path, size: int) -> None:
    """Remove the least recently used files until `size` more bytes fit. A process that has one of
    them mapped goes on reading it."""
    limit = float(os.environ.get(LIMIT_GB, 100)) * 1e9
    files = []
    for file in folder.glob("*.parquet"):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            files.append((status.st_mtime, status.st_size, file))
    total = sum(length for _, length, _ in files) + size
    for _, length, file in sorted(files):
        if total <= limit:
            return
        file.unlink(missing_ok=True)
        total -= length
