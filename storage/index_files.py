"""Where indexes are kept: beside each shard, beside the manifest, and in a cache on this machine.

    00003/00007-9f1c….index   of a shard; written before its marker
    00003/complete.index      of a complete partition of a remote dump, joined from those
    rows-41d0….index          of the finished dump, joined from those; named by the sha256 of its
                              manifest.json

A dump of before gets its index in the cache. A remote index is copied there, to be mapped. The
cache is MOL_CACHE or, without it, a folder of the user's.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path

from storage.errors import CorruptShard, StorageError
from storage.index import VERSION, Index, Part, pack_index, parts_of
from storage.store import Store, cache_folder

SHARD_INDEX_BYTES, PARTITION_INDEX_BYTES = 256 << 20, 4 << 30  # most that is read
DUMP_INDEX = re.compile(r"rows-[0-9a-f]{16}\.index", re.ASCII)
SHARD_INDEX = re.compile(r"\d{5,9}/\d{5,9}-[0-9a-f]{12}\.index", re.ASCII)


def shard_index(data_file: str) -> str:
    """The name of a shard's index: 00003/00007-9f1c.parquet -> 00003/00007-9f1c.index."""
    return data_file.removesuffix(".parquet") + ".index"


def dump_index(fingerprint: str) -> str:
    """The name of the index of a finished dump."""
    return f"rows-{fingerprint[:16]}.index"


def partition_index(partition: int) -> str:
    """The name of the index of a complete partition."""
    return f"{partition:05d}/complete.index"


def shards_key(sha256s: Iterable[str]) -> str:
    """What the index of several shards is of: the sha256 of those of their data files."""
    return hashlib.sha256("\n".join(sha256s).encode()).hexdigest()


def committed_part(
    store: Store, file: str, sha256: str, plan_sha256: str, masked: bool
) -> Part | None:
    """What the index beside a shard says; None if it has none that can be used.

    `masked` says whether the rows of the dump have masks, whose targets it then needs.
    """
    name = shard_index(file)
    try:
        data = store.read(name, SHARD_INDEX_BYTES)
    except CorruptShard:
        return None
    found = usable(data, name, sha256, plan_sha256, masked, 1)
    return found[0] if found else None


def usable(
    data: bytes | None, name: str, key: str, plan_sha256: str, masked: bool, shards: int
) -> list[Part] | None:
    """The parts of an index of so many shards; None for one that cannot be used."""
    try:
        if data is None:
            return None
        return parts_of(checked(data, name, key, plan_sha256, masked, shards))
    except StorageError:  # derived data: the shards say it all
        return None


def checked(data: bytes, name: str, key: str, plan_sha256: str, masked: bool, shards: int) -> Index:
    """An index of so many shards. Raises CorruptIndex and FormatVersionError."""
    index = Index(data, name, key, plan_sha256)
    if len(index.shards) != shards:
        raise index.damaged(f"{len(index.shards)} shards, expected {shards}")
    if index.masked != masked:
        words = ("without targets", "with targets")
        raise index.damaged(f"{words[index.masked]}, the plan is {words[masked]}")
    return index


def joined(
    store: Store,
    shards: Sequence[tuple[str, str]],
    names: Set[str],
    key: str,
    plan_sha256: str,
    masked: bool,
) -> bytes | None:
    """The index over shards, given as (data file, sha256), in order; None if one has none.

    It is joined from those of complete partitions and, where a partition has none, of its shards,
    as far as they are among the `names` of the store. Reads no shard.
    """
    partitions: dict[str, list[tuple[str, str]]] = {}
    for shard in shards:
        partitions.setdefault(shard[0].split("/")[0], []).append(shard)
    kept = [name for name in map(partition_index, map(int, partitions)) if name in names]
    data = indexes(store, kept, PARTITION_INDEX_BYTES)
    found: dict[str, list[Part] | None] = {}
    for name, these in partitions.items():
        file = partition_index(int(name))
        whole = shards_key(sha256 for _, sha256 in these)
        found[name] = usable(data.get(file), file, whole, plan_sha256, masked, len(these))
    left = [shard for name, these in partitions.items() if not found[name] for shard in these]
    own = [shard_index(file) for file, _ in left]
    if not names >= set(own):
        return None
    data = indexes(store, own, SHARD_INDEX_BYTES)
    for name, (_, sha256) in zip(own, left, strict=True):
        part = usable(data.get(name), name, sha256, plan_sha256, masked, 1)
        if part is None:
            return None
        of = name.split("/")[0]
        found[of] = [*(found[of] or []), *part]
    return pack_index([part for parts in found.values() for part in parts or []], key, plan_sha256)


def indexes(store: Store, names: Sequence[str], most: int) -> dict[str, bytes | None]:
    """These files; without any where one is no index of ours: shards say all that indexes do."""
    try:
        return store.read_many(names, most)
    except CorruptShard:
        return {}


def index_in_dump(store: Store, key: str, plan_sha256: str) -> Index | None:
    """The index beside the manifest with this sha256; None if there is none.

    It is mapped. Raises CorruptIndex, FormatVersionError and StoreError.
    """
    name = dump_index(key)
    with contextlib.suppress(FileNotFoundError):
        if not store.local:
            return Index(store.fetched(name), name, key, plan_sha256)
        path = store.regular(name)
        with store.explaining("read", name, but=FileNotFoundError):
            return Index.open(path, name, key, plan_sha256)
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
