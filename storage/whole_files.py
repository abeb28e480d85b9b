"""Whole files of a remote store, in the cache of this machine.

A file is downloaded by one process while the others wait, under a temporary name that is then
renamed, so none sees half a file. It is named by its sha256, so it is never stale.
"""

import contextlib
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from storage.cache import make_room
from storage.errors import CorruptShard
from storage.store import Store, cache_folder

LOCKS = ".locks"  # one byte stands for each file


def cached(store: Store, name: str, sha256: str, kind: str = "parquet") -> Path | None:
    """Path of the local copy of a file, downloaded if needed. None without a cache.

    `kind` is the ending of its name there. Raises CorruptShard if the store's file has another
    sha256, StoreError if the store cannot be read, FileNotFoundError if the file is missing.
    """
    folder = cache_folder()
    if store.local or not folder:
        return None
    path = Path(folder) / f"{sha256}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # mark as used: make_room removes the least recently used files
            return path
        download(store, name, sha256, path)
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a cached file; other processes wait."""
    with path.with_name(LOCKS).open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, int(path.name[:15], 16))
        yield


def download(store: Store, name: str, sha256: str, path: Path) -> None:
    own = path.with_name(f".fetching-{uuid.uuid4().hex}")
    try:
        store.attempt("read", name, lambda: store.fs.get_file(store / name, str(own)))
        with own.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise CorruptShard(
                f"{name}: the sha256 is {found}, the marker says {sha256}: the file was changed "
                "after commit; restore it from a copy"
            )
        make_room(path.parent, own.stat().st_size)
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)
