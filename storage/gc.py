"""Find the files that dead writers left behind, and remove them on request.

This is safe while writers run. Files are listed before markers are read, and each shard's marker is
read, also where the listing has none. So a file that no marker names had none when its age was
measured. The files of a running writer are younger than the limit: it
writes to an open shard with every row group, and names a closed one in a marker within one commit.
Tables that shards share may be named at any time until a dump is finished.
"""

import contextlib
import os
import re
from dataclasses import dataclass

from storage.dump_tables import TABLES_FILE, tables_file
from storage.errors import IncompleteDump
from storage.index_files import DUMP_INDEX, SHARD_INDEX, dump_index, shard_index
from storage.manifest import Dump, Shard
from storage.parsing import MARKER_BYTES, SHARD_NAME, from_json
from storage.store import is_own_folder, walk

DEFAULT_HOURS = 24.0
# The names that writers give: no other file is ever removed.
MARKER = re.compile(rf"({SHARD_NAME.pattern})\.json", re.ASCII)
DATA_FILE = r"\d{5,9}/\d{5,9}-[0-9a-f]{12}\.parquet"
OURS = re.compile(rf"{DATA_FILE}|{SHARD_INDEX.pattern}|{DUMP_INDEX.pattern}", re.ASCII)
FINISHED_OURS = re.compile(rf"{OURS.pattern}|{TABLES_FILE.pattern}", re.ASCII)
WRITING = r"\.writing-\d{5,9}-\d{5,9}-[0-9a-f]{32}"  # ShardWriter.flush
CREATING = r"((\d{5,9}|tokenizer)/)?\.creating-[a-z0-9_]{8}"  # create_local
OF_SHARD = re.compile(rf"({SHARD_NAME.pattern})(-[0-9a-f]+\.(parquet|index)|\.json)", re.ASCII)
OPEN_FILE = re.compile(rf"\d{{5,9}}/{WRITING}|{CREATING}", re.ASCII)
STAGED_FILE = re.compile(WRITING, re.ASCII)


@dataclass(frozen=True)
class Leftover:
    """A file that no marker names: its name below the dump, its bytes, its age in seconds.

    `staged` marks an open shard of a remote dump on this machine; its name is a local path.
    """

    name: str
    bytes: int
    age: float
    staged: bool = False


def leftovers(path: str | os.PathLike[str], hours: float = DEFAULT_HOURS) -> list[Leftover]:
    """Files older than `hours` that neither a marker nor the manifest names.

    Raises IncompleteDump if there is no dump, StoreError, and CorruptShard for an unreadable
    marker: any file may then be committed data. Links are never followed or removed.
    """
    dump = Dump(path)
    store = dump.store
    entries = store.entries()
    shards: list[Shard] = []
    named, ours = set[str](), OURS
    with contextlib.suppress(IncompleteDump):
        manifest = dump.manifest()
        shards += manifest.shards
        named.add(dump_index(manifest.fingerprint))
        ours = FINISHED_OURS
    markers = dict.fromkeys(name for file in entries if (name := marker_of(file)))
    for name, data in store.read_many(markers, MARKER_BYTES).items():
        if data is not None:
            shards.append(dump.committed(name.removesuffix(".json"), from_json(data, name)))
    for shard in shards:
        named |= {shard.file, shard_index(shard.file)}
        named |= {tables_file(shard.tables)} if shard.tables else set()
    found = [
        Leftover(name, entry.bytes, entry.age)
        for name, entry in sorted(entries.items())
        if entry.age > 3600 * hours
        and not entry.link
        and (OPEN_FILE.fullmatch(name) or (ours.fullmatch(name) and name not in named))
    ]
    if not store.local and is_own_folder(store.remote_staging):
        for name, entry in sorted(walk(str(store.remote_staging))):
            if entry.age > 3600 * hours and STAGED_FILE.fullmatch(name) and not entry.link:
                file = str(store.remote_staging / name)
                found.append(Leftover(file, entry.bytes, entry.age, staged=True))
    return found


def marker_of(name: str) -> str | None:
    """The marker that is or may name this file: 00003/00007-9f1c.index -> 00003/00007.json."""
    match = OF_SHARD.fullmatch(name)
    return f"{match[1]}.json" if match else None


def remove(path: str | os.PathLike[str], found: list[Leftover]) -> None:
    """Delete these files. Raises StoreError."""
    store = Dump(path).store
    for leftover in found:
        if leftover.staged:
            os.unlink(leftover.name)
        else:
            store.remove(leftover.name)
