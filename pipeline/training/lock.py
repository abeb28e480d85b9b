"""One run in an output directory at a time."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import FailedError
from pipeline.progress import say

LOCK = ".mol-distill.lock"


def turn_away(folder: Path) -> None:
    """FailedError where another run holds the directory. Fast, and writes nothing.

    For scripts, before they load torch; `hold` decides. Ranks after the first one do not look: the
    first one of their own run may hold it already.
    """
    if int(os.environ.get("RANK", 0)) == 0 and (folder / LOCK).is_file():
        file = os.open(folder / LOCK, os.O_RDWR)
        try:
            reason = refusal(file, folder)
        finally:
            os.close(file)
        if reason is not None:
            raise FailedError(reason)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other runs out of a directory, on all ranks; makes it.

    The lock is a lock of the kernel on a file, which ends with the process that took it.
    Raises FailedError where another run holds it: the same command may succeed when that has ended.
    """
    from torch import distributed  # late: `turn_away` is for before torch is loaded

    first = not distributed.is_initialized() or distributed.get_rank() == 0
    found: list[str | None] = [None]
    file = None
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        found = [refusal(file, folder)]
        if found[0] is None:
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    if distributed.is_initialized():
        distributed.broadcast_object_list(found)
    try:
        if found[0] is not None:
            raise FailedError(found[0])
        yield
    finally:
        if file is not None:
            os.close(file)


def refusal(file: int, folder: Path) -> str | None:
    """Take the lock of an open file; returns why not where another process has it."""
    try:
        # Not flock: processes that read data would inherit it, and keep it after a crash.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            say(
                f"{folder}: this file system has no locks ({error.strerror}); start one run at most"
            )
            return None
        owner = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        return f"{folder}: a run is at work there ({owner}); wait for it, or choose another output"
    return None
