"""What this machine keeps of remote shards, in the folder that MOL_CACHE names.

    SHA256.rows     a sparse file in which each range that was read lies where it lies in the shard
    SHA256.have     lists the ranges: offset, bytes and CRC-32 of each
    SHA256.parquet  a whole shard, which was read in order
    SHA256.tables   tables of version 3, which many shards share

Files are named by the sha256 of the shard or of the tables, so they are never stale. A range is
listed after it is written, and counts as absent where its CRC-32 differs. So any number of
processes may share a cache, and any of them may die.

MOL_CACHE_GB limits the cache, in units of 1e9 bytes (default 100). A full cache loses the shards
that nobody used for an hour; where there are none, it takes no more ranges. Rows are read in random
order: to make room for one by removing others would fetch them again and again.
"""

import contextlib
import os
import re
import struct
import threading
import time
import zlib
from pathlib import Path

from storage.errors import StoreError
from storage.parsing import SHA256
from storage.store import cache_folder

LIMIT_GB = "MOL_CACHE_GB"
KEPT_FILE = re.compile(rf"({SHA256.pattern})\.(parquet|rows|have|tables)")
RANGE = struct.Struct("<QII")  # offset, bytes, CRC-32
IDLE = 3600.0  # seconds after which a shard may be removed for ranges of others
TOUCH = 60.0  # seconds between two notes that a shard is in use
COUNT_BYTES = 64 << 20  # that a process writes between two looks at the folder


class RangeCache:
    """The ranges of one shard. Threads and forked processes may share it.

    Raises StoreError where the folder cannot be written.
    """

    def __init__(self, room: "Room", sha256: str) -> None:
        self.room, self.lock = room, threading.Lock()
        self.handles: list[int] = []
        self.listed = room.folder / f"{sha256}.have"
        self.ranges: dict[int, tuple[int, int]] = {}  # offset: bytes, CRC-32
        self.known = 0  # bytes of the list that `ranges` has
        self.touched = -TOUCH
        flags = os.O_RDWR | os.O_CREAT
        try:
            self.rows = self.open(room.folder / f"{sha256}.rows", flags)
            self.have = self.open(self.listed, flags | os.O_APPEND)
        except OSError as error:
            raise StoreError(
                f"MOL_CACHE {room.folder}: cannot be written: {error}. Choose another folder"
            ) from error
        self.whole: int | None = None
        with contextlib.suppress(OSError):
            self.whole = self.open(room.folder / f"{sha256}.parquet", os.O_RDONLY)

    def open(self, path: Path, flags: int) -> int:
        self.handles.append(os.open(path, flags | os.O_CLOEXEC, 0o644))
        return self.handles[-1]

    def __del__(self) -> None:  # not before the last thread is done with it
        for handle in self.handles:
            os.close(handle)

    def get(self, offset: int, size: int) -> bytes | None:
        """The range, if any process has put it here."""
        if self.whole is not None:
            return os.pread(self.whole, size, offset)
        if offset not in self.ranges:
            self.refresh()
        found = self.ranges.get(offset)
        if found is None or found[0] != size:
            return None
        data = os.pread(self.rows, size, offset)
        self.touch()
        return data if zlib.crc32(data) == found[1] else None

    def put(self, offset: int, data: bytes) -> None:
        """Keep a range, if there is room. A disk that fails keeps nothing."""
        with contextlib.suppress(OSError):
            if self.room.take(len(data)) and os.pwrite(self.rows, data, offset) == len(data):
                os.write(self.have, RANGE.pack(offset, len(data), zlib.crc32(data)))

    def refresh(self) -> None:
        """Learn what other processes have put here since the last look."""
        with self.lock:
            new = os.pread(self.have, os.fstat(self.have).st_size - self.known, self.known)
            new = new[: len(new) // RANGE.size * RANGE.size]
            for offset, size, crc in RANGE.iter_unpack(new):
                self.ranges[offset] = size, crc
            self.known += len(new)

    def touch(self) -> None:
        """Note that the shard is in use."""
        if time.monotonic() - self.touched > TOUCH:
            self.touched = time.monotonic()
            with contextlib.suppress(OSError):  # removed by another process
                os.utime(self.listed)


class Room:
    """Keeps the folder within its limit. Raises StoreError unless MOL_CACHE_GB is a number."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.limit, self.lock = folder, limit_bytes(), threading.Lock()
        with contextlib.suppress(OSError):  # where a cache opens, it says why
            folder.mkdir(parents=True, exist_ok=True)
        self.free = 0.0  # bytes to take before the next look at the folder
        self.look_at = 0.0  # not before this time, where the folder was full

    def take(self, size: int) -> bool:
        """Whether a range of `size` bytes may be written."""
        with self.lock:
            if self.free < size and time.monotonic() >= self.look_at:
                used = make_room(self.folder, min(COUNT_BYTES, self.limit), IDLE)
                self.free = min(self.limit - used, COUNT_BYTES)
                self.look_at = time.monotonic() + (TOUCH if self.free < size else 0)
            if self.free < size:
                return False
            self.free -= size
            return True


def make_room(folder: Path, size: float, idle: float = 0.0) -> float:
    """Remove the least recently used shards, if idle for so many seconds, until `size` more bytes
    fit. Returns the bytes that are left in use.

    A process that has mapped or opened a removed file can still read it. Other files stay.
    """
    shards: dict[str, list[tuple[float, int, Path]]] = {}
    for file in folder.iterdir():
        if match := KEPT_FILE.fullmatch(file.name):
            with contextlib.suppress(FileNotFoundError):
                status = file.lstat()
                found = status.st_mtime, 512 * status.st_blocks, file
                shards.setdefault(match[1], []).append(found)
    used = float(sum(length for files in shards.values() for _, length, _ in files))
    for files in sorted(shards.values(), key=lambda files: max(last for last, _, _ in files)):
        if used + size <= limit_bytes() or time.time() - max(last for last, _, _ in files) < idle:
            break
        for _, length, file in files:
            file.unlink(missing_ok=True)
            used -= length
    return used


def limit_bytes() -> float:
    """The cache's limit. Raises StoreError unless MOL_CACHE_GB is a number."""
    given = os.environ.get(LIMIT_GB, "100")
    try:
        limit = float(given) * 1e9
    except ValueError:
        limit = -1.0
    if not limit >= 0:  # NaN too
        raise StoreError(f"{LIMIT_GB}: expected a number of 1e9 bytes, 0 or more, found {given!r}")
    return limit


def too_small(size: int) -> str | None:
    """What to say where there is a cache, and shards of `size` bytes do not fit; else None."""
    if not cache_folder() or size <= limit_bytes():
        return None
    return (
        f"{LIMIT_GB}: the cache holds {limit_bytes() / 1e9:g} GB, the dumps have {size / 1e9:.3g}: "
        "rows that do not fit are fetched again in each pass. Raise it where the disk allows"
    )
