"""How readers get the bytes of a committed data file.

A local file is memory-mapped. A remote one is read in ranges or, to be read in order on a machine
with a cache, downloaded as a whole (whole_files.py).
"""

import io
import os
from typing import Any

import pyarrow as pa

from storage.errors import CorruptShard
from storage.manifest import Shard
from storage.store import Store
from storage.whole_files import cached

MISSING = (
    "the data file is missing, but its marker exists; restore the file, or remove the marker and "
    "run the dump again"
)


def open_source(store: Store, shard: Shard) -> Any:
    """Open a shard's data file for pyarrow.

    Raises FileNotFoundError if it is missing, CorruptShard if the store holds another file than
    the committed one, StoreError if the store cannot be read.
    """
    if store.local:  # memory-mapped: reading a row group copies nothing
        path = store.regular(shard.file)
        check_size(shard, os.path.getsize(path))
        return pa.memory_map(path)
    local = cached(store, shard.file, shard.marker["sha256"])
    if local is not None:
        return pa.memory_map(str(local))
    size = int(store.attempt("read", shard.file, lambda: store.fs.info(store / shard.file)["size"]))
    check_size(shard, size)
    return pa.PythonFile(RangeFile(store, shard.file, size), mode="r")


def open_local(store: Store, shard: Shard) -> int:
    """A file descriptor of a local shard.

    Raises CorruptShard if it is missing or another file than the committed one, and StoreError.
    """
    try:
        path = store.regular(shard.file)
        with store.explaining("read", shard.file, but=FileNotFoundError):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorruptShard(MISSING) from None
    try:
        check_size(shard, os.fstat(handle).st_size)
    except CorruptShard:
        os.close(handle)
        raise
    return handle


def read_range(store: Store, shard: Shard, offset: int, size: int) -> bytes:
    """A range of a remote shard, in one request. Raises as open_local."""

    def fetch() -> bytes:
        path = store / shard.file
        try:
            data: bytes = store.fs.cat_file(path, start=offset, end=offset + size)
        except FileNotFoundError:
            raise CorruptShard(MISSING) from None
        except Exception:
            check_size(shard, int(store.fs.info(path)["size"]))  # a file cut short: do not retry
            raise
        if len(data) != size:
            check_size(shard, int(store.fs.info(path)["size"]))
            raise OSError(f"{size} bytes expected, {len(data)} arrived")
        return data

    return store.attempt("read", shard.file, fetch)


def check_size(shard: Shard, size: int) -> None:
    """Raise CorruptShard unless the file has the bytes that the marker says."""
    if size != shard.marker["bytes"]:
        raise CorruptShard(
            f"{size} bytes, the marker says {shard.marker['bytes']}: this is not the committed file"
        )


class RangeFile(io.RawIOBase):
    """A remote file, read in ranges. Store.attempt retries each range while the store fails."""

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
                raise OSError(f"{stop - start} bytes expected, {len(data)} arrived")
            return data

        data = self.store.attempt("read", self.name, fetch)
        self.at = stop
        return data
