"""Where indexes are kept: beside each shard, beside the manifest, and in a cache on this machine.

    00003/00007-9f1c….index   written before the shard's marker; `Dump.finish` joins them
    rows-41d0….index          of the finished dump, named by the sha256 of its manifest.json

A dump of before gets its index in the cache. A remote index is copied there, to be mapped. The
cache is MOL_CACHE or, without it, a folder of the user's.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from storage.errors import StorageError, StoreError
from storage.index import VERSION, Index, Part, pack_index, parts_of
from storage.store import Store, cache_folder

SHARD_INDEX_BYTES = 256 << 20
DUMP_INDEX = re.compile(r"rows-[0-9a-f]{16}\.index", re.ASCII)
SHARD_INDEX = re.compile(r"\d{5,9}/\d{5,9}-[0-9a-f]{12}\.index", re.ASCII)


def shard_index(data_file: str) -> str:
    """The name of a shard's index: 00003/00007-9f1c.parquet -> 00003/00007-9f1c.index."""
    return data_file.removesuffix(".parquet") + ".index"


def dump_index(fingerprint: str) -> str:
    """The name of the index of a finished dump."""
    return f"rows-{fingerprint[:16]}.index"


def committed_part(
    store: Store, file: str, sha256: str, plan_sha256: str, masked: bool
) -> Part | None:
    """What the index beside a shard says; None if it has none that can be used.

    `masked` says whether the rows of the dump have masks, whose targets it then needs.
    """
    name = shard_index(file)
    try:
        data = store.read(name, SHARD_INDEX_BYTES)
        index = Index(data, name, sha256, plan_sha256) if data is not None else None
        if index is None or len(index.shards) != 1 or index.masked != masked:
            return None
        return parts_of(index)[0]
    except StoreError:
        raise
    except StorageError:  # derived data: the shard says it all
        return None


def joined(
    store: Store, shards: Sequence[tuple[str, str]], key: str, plan_sha256: str, masked: bool
) -> bytes | None:
    """The index over shards, given as (data file, sha256), from those beside them; None if one
    has none. Reads no shard."""
    parts = []
    for file, sha256 in shards:
        part = committed_part(store, file, sha256, plan_sha256, masked)
        if part is None:
            return None
        parts.append(part)
    return pack_index(parts, key, plan_sha256)


def index_in_dump(store: Store, key: str, plan_sha256: str) -> Index | None:
    """The index beside the manifest with this sha256; None if there is none.

    A local one is mapped. Raises CorruptIndex, FormatVersionError and StoreError.
    """
    name = dump_index(key)
    if not store.local:
        data = store.read(name)
        return None if data is None else Index(data, name, key, plan_sha256)
    try:
        path = store.regular(name)
        with store.explaining("read", name, but=FileNotFoundError):
            return Index.open(path, name, key, plan_sha256)
    except FileNotFoundError:
        return None


def open_index(store: Store, key: str, plan_sha256: str) -> Index | None:
    """The index of a finished dump, from its folder or the cache; None if it has none yet.

    Raises as index_in_dump. A cached index that is damaged is removed.
    """
    found = None if store.local else in_cache(key, plan_sha256)
    if found is None:
        found = index_in_dump(store, key, plan_sha256)
        if found is not None and not store.local:
            return keep(found)
    return in_cache(key, plan_sha256) if found is None and store.local else found


def cache_path(key: str) -> Path:
    """Where this machine keeps an index. Releases with another layout have other names."""
    return Path(cache_folder() or user_cache()) / f"{key}.index{VERSION}"


def user_cache() -> Path:
    """The folder of this user's cached indexes. Raises RuntimeError without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mol-distill"


def in_cache(key: str, plan_sha256: str) -> Index | None:
    """The cached index; one that is damaged is removed."""
    with contextlib.suppress(OSError, RuntimeError):  # without a home there is no cache
        path = cache_path(key)
        try:
            return Index.open(path, str(path), key, plan_sha256)
        except StorageError:
            path.unlink(missing_ok=True)
    return None


def keep(index: Index) -> Index:
    """Put an index into the cache and map it; where that fails, it stays in memory."""
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_path(index.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            own.write_bytes(index.data)
            os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)
        return Index.open(path, str(path), index.key, index.plan_sha256)
    return index


def made_once(key: str, plan_sha256: str, make: Callable[[], Index]) -> Index:
    """The cached index, made by one process while the others wait."""
    with locked(key):
        found = in_cache(key, plan_sha256)
        return keep(make()) if found is None else found


@contextlib.contextmanager
def locked(key: str) -> Iterator[None]:
    """Hold the lock of a cached index; without a cache that can be written, there is none."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, RuntimeError):
            path = cache_path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.with_name(f".{path.name}.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
