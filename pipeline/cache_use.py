"""Which files of the caches processes use: a lock of the kernel says so, and ends with the process.

The time of a cached file is that of its last use.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

HELD: dict[tuple[int, int], int] = {}
"""Open files that this process uses, by device and inode."""
MOST_HELD = 256
"""Many systems let a process open 1,024 files. Of further ones, such as the copies of a corpus of
many remote files, the time of the last use must do."""


def use(path: Path) -> bool:
    """Use a cached file until this process ends. False where it is not there, or goes away."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    going = not in_use(file)
    with contextlib.suppress(OSError):  # of another user
        os.utime(file)
    found = os.fstat(file)
    going = going or not found.st_nlink
    if going or (found.st_dev, found.st_ino) in HELD or len(HELD) >= MOST_HELD:
        os.close(file)
    else:
        HELD[found.st_dev, found.st_ino] = file
    return not going


def in_use(file: int) -> bool:
    """Take the lock of an open file until it is closed. False where it is being removed."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


@contextlib.contextmanager
def unused(path: Path, lock: Callable[[int, int], None] = fcntl.flock) -> Iterator[bool]:
    """Whether no process uses a cached file, by this kind of lock; none begins to within the block.

    False where that cannot be known: of another user's file, and without locks.
    """
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        yield isinstance(error, FileNotFoundError)
        return
    try:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(file)
