"""The tables that the shards of a dump share: files beside plan.json, named by what they hold.

    tables-9f1c….bin    the first 16 digits of its sha256; created once, before any marker names it

A marker of version 3 has the whole sha256. So the tables of a shard are the same for ever, whatever
else is written to the dump.
"""

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from storage.codec.v3_tables import Tables
from storage.errors import CorruptPayload, CorruptShard, StorageError, StoreError
from storage.kept import Kept
from storage.store import Store
from storage.whole_files import cached

TABLES_FILE = re.compile(r"tables-[0-9a-f]{16}\.bin", re.ASCII)
MOST_BYTES = 256 << 20  # of a file
KEPT_BYTES = 256 << 20  # of the tables that a process keeps in memory


def tables_file(sha256: str) -> str:
    """The name of the tables with this sha256."""
    return f"tables-{sha256[:16]}.bin"


class DumpTables:
    """The tables of a dump for a vocabulary of `vocab_size` ids; those used last stay in memory.

    Threads may share it. Raises CorruptShard that names the file, FormatVersionError for tables of
    a later release, and StoreError.
    """

    def __init__(self, store: Store, vocab_size: int) -> None:
        self.store, self.vocab_size = store, vocab_size
        self._kept: Kept[Tables] = Kept(KEPT_BYTES)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["DumpTables"], tuple[Store, int]]:
        return (DumpTables, (self.store, self.vocab_size))

    def get(self, sha256: str) -> Tables:
        """The tables with this sha256: one request, and none while they are kept."""
        with self._lock:
            return self._kept.get(sha256, lambda: self._read(sha256), lambda found: found.nbytes)

    def sizes(self, named: Iterable[str]) -> dict[str, int | None]:
        """Bytes of the files of these tables, by name; None for one that is missing."""
        names = sorted(map(tables_file, set(named)))
        there = self.store.top() if names else {}
        return {name: there[name].bytes if name in there else None for name in names}

    @property
    def recent(self) -> list[str]:
        """The sha256 of the tables in memory, those used last first."""
        with self._lock:
            return [str(sha256) for sha256 in reversed(self._kept.values)]

    def newest(self, most: int) -> list[str]:
        """The sha256 of the dump's tables, the newest first, at most `most` of them.

        Damaged ones are left out: whoever needs them says so.
        """
        there = {n: e for n, e in self.store.top().items() if TABLES_FILE.fullmatch(n)}
        newest = sorted(there, key=lambda name: (there[name].age, name))[:most]
        known = {tables_file(sha256): sha256 for sha256 in self.recent}
        found = [known.get(name) or self._sha256_of(name) for name in newest]
        return [sha256 for sha256 in found if sha256 is not None]

    def _sha256_of(self, name: str) -> str | None:
        """The sha256 of a file, if it is the one that its name says; tables are then kept."""
        with contextlib.suppress(CorruptShard, CorruptPayload):
            data = self.store.read(name, MOST_BYTES)
            sha256 = hashlib.sha256(data or b"").hexdigest()
            if data is not None and tables_file(sha256) == name:
                self._keep(sha256, Tables.unpack(data, self.vocab_size))
                return sha256
        return None

    def _keep(self, sha256: str, tables: Tables) -> None:
        with self._lock:
            self._kept.get(sha256, lambda: tables, lambda found: found.nbytes)

    def publish(self, tables: Tables) -> str:
        """Create the file of these tables, if it does not exist. Returns their sha256."""
        data = tables.pack()
        sha256 = hashlib.sha256(data).hexdigest()
        name = tables_file(sha256)
        if not self.store.create(name, data):
            self._read(sha256)
        self._keep(sha256, tables)
        return sha256

    def _read(self, sha256: str) -> Tables:
        name = tables_file(sha256)
        data = self._bytes(name, sha256)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise CorruptShard(
                f"{name}: the sha256 is {found}, the marker says {sha256}: the file was changed, "
                "and the shards that name it cannot be read; restore it from a copy"
            )
        try:
            return Tables.unpack(data, self.vocab_size)
        except StoreError:
            raise
        except StorageError as error:
            raise type(error)(f"{name}: {error}") from None

    def _bytes(self, name: str, sha256: str) -> bytes:
        """A file, from the cache of this machine if the store is remote and there is one."""
        try:
            path = cached(self.store, name, sha256, "tables")
            if path is not None:
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() == sha256:
                    return data
                Path(path).unlink(missing_ok=True)  # the cache's copy is damaged
        except FileNotFoundError:
            pass
        data_or_none = self.store.read(name, MOST_BYTES)
        if data_or_none is None:
            raise CorruptShard(
                f"{name}: missing, though markers name it, and their shards cannot be read without "
                "it; restore it from a copy"
            )
        return data_or_none
