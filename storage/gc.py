"""Find the files that dead writers left behind, and remove them on request.

This is safe while writers run. Files are listed before markers are read, so a file without a marker
had none when its age was measured. The files of a running writer are younger than the limit: it
writes to an open shard with every row group, and names a closed one in a marker within one commit.
"""

import os
import re
import time
from dataclasses import dataclass

from storage.manifest import Dump, Shard, from_json

DEFAULT_HOURS = 24.0
MARKER = re.compile(r"(\d{5,}/\d{5,})\.json")
DATA_FILE = re.compile(r"\d{5,}/\d{5,}-[0-9a-f]+\.parquet")
OPEN_FILE = re.compile(r"(.*/)?\.(writing|creating)-[^/]+")


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
    """Files older than `hours` that no marker names.

    Raises IncompleteDump if there is no dump, StoreError, and CorruptShard for an unreadable
    marker: any file may then be committed data.
    """
    store = Dump(path).store
    ages = store.ages()
    sizes = store.files()
    named = set()
    for name in sizes:  # every marker, also those after a missing one
        match = MARKER.fullmatch(name)
        data = store.read(name) if match else None
        if match and data:
            named.add(Shard(match[1], from_json(data, name)).file)
    found = [
        Leftover(name, sizes[name], age)
        for name, age in sorted(ages.items())
        if age > 3600 * hours
        and name in sizes
        and (OPEN_FILE.fullmatch(name) or (DATA_FILE.fullmatch(name) and name not in named))
    ]
    if not store.local and store.remote_staging.is_dir():
        for file in sorted(store.remote_staging.glob(".writing-*")):
            status = file.stat()
            age = time.time() - status.st_mtime
            if age > 3600 * hours:
                found.append(Leftover(str(file), status.st_size, age, staged=True))
    return found


def remove(path: str | os.PathLike[str], found: list[Leftover]) -> None:
    """Delete these files. Raises StoreError."""
    store = Dump(path).store
    for leftover in found:
        if leftover.staged:
            os.unlink(leftover.name)
        else:
            store.remove(leftover.name)
