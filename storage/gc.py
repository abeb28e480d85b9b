"""gc: find, and on request remove, what dead writers left behind.

Safe beside live writers: files are listed first and markers read after, so what looks unnamed had
no marker when its age was taken, and a live writer's files are younger than the limit (an open
shard is touched with every row group, a closed one is named within one commit).
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
    """A file that no marker names: its name below the dump, bytes, and age in seconds.

    `staged` is an open shard of a remote dump, on this machine; its name is a local path.
    """

    name: str
    bytes: int
    age: float
    staged: bool = False


def leftovers(path: str | os.PathLike[str], hours: float = DEFAULT_HOURS) -> list[Leftover]:
    """Files older than `hours` that no marker names. Raises IncompleteDump where there is no dump,
    CorruptShard for a marker that cannot be read: then nothing is known to be a leftover."""
    store = Dump(path).store
    ages = store.ages()
    sizes = store.files()
    named = set()
    for name in sizes:  # all markers, also those behind a gap
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
    """Remove these leftovers."""
    store = Dump(path).store
    for leftover in found:
        if leftover.staged:
            os.unlink(leftover.name)
        else:
            store.remove(leftover.name)
