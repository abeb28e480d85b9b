"""List what the caches of corpora hold, and remove what was not used for some days.

    python -m pipeline.caches
    python -m pipeline.caches remove --older-than 30

They lie in $HF_DATASETS_CACHE: the documents of files (corpora), their tokens (tokens), copies of
remote files (remote), and the sha256 of large files (digests). All of it is made again where it is
needed. What a process uses stays, and so does everything that this project did not make.
"""

import argparse
import fcntl
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import cli
from pipeline.cache_use import unused
from pipeline.corpus_cache import cache_folder
from pipeline.json_files import read_object
from pipeline.progress import show
from pipeline.ranges import Range, within
from pipeline.token_store import LOCKS, PART, STORE
from pipeline.types import Json

DAY = 86_400.0  # seconds
NAMED = {
    "corpora": re.compile(r"[0-9a-f]{64}\.arrow|\.building-\w+"),
    "tokens": re.compile(r"[0-9a-f]{64}"),
    "remote": re.compile(r"[0-9a-f]{20}|\.copying-\w+"),
    "digests": re.compile(r"[0-9a-f]{64}\.json"),
}
"""What this project makes in each folder."""


@dataclass(frozen=True)
class Entry:
    """One thing that a cache holds: a file, or a folder of files."""

    kind: str
    path: Path

    @property
    def files(self) -> list[Path]:
        """Ours; of a folder, what it holds."""
        if not self.path.is_dir():
            return [self.path]
        found = sorted(file for file in self.path.iterdir() if file.is_file())
        if self.kind == "tokens":
            own = {STORE, LOCKS}
            found = [file for file in found if file.name in own or PART.fullmatch(file.name)]
        return found

    @property
    def marks(self) -> list[Path]:
        """Files that a process which uses the entry holds a lock on."""
        return [self.path / STORE] if self.kind == "tokens" else self.files

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def used(self) -> float:
        """Seconds since 1970 of the last use."""
        return max(each.stat().st_mtime for each in [self.path, *self.files])

    @property
    def note(self) -> str:
        """What is known of it, for people."""
        if self.kind == "remote":
            return ", ".join(file.name for file in self.files)
        if self.kind != "tokens":
            return ""
        found = read_object(self.path / STORE)
        return "not finished" if found is None else str(found.get("facts", {}).get("path", ""))

    def remove(self) -> int:
        """Remove it unless a process uses it; returns the bytes that are free then."""
        with ExitStack() as held:
            if not all(held.enter_context(unused(mark)) for mark in self.marks):
                return 0
            if self.kind == "tokens" and not held.enter_context(nobody_writes(self.path / LOCKS)):
                return 0
            freed = self.bytes
            for file in sorted(self.files, key=lambda file: file.name != STORE):  # it comes first
                file.unlink(missing_ok=True)
            if self.path.is_dir():
                with suppress(OSError):  # something else is in it
                    self.path.rmdir()
            return freed


def nobody_writes(locks: Path) -> AbstractContextManager[bool]:
    """Whether no process makes parts of a store; none begins to within the block."""
    return unused(locks, fcntl.lockf)


def entries() -> Iterator[Entry]:
    """What the caches hold, of what this project makes."""
    for kind, name in NAMED.items():
        for path in sorted(cache_folder(kind).iterdir()):
            if name.fullmatch(path.name) and not path.is_symlink():
                yield Entry(kind, path)


def listed() -> Json:
    """Print every entry, and the bytes of each cache."""
    now, total = time.time(), dict.fromkeys(NAMED, 0)
    for each in entries():
        with suppress(FileNotFoundError):  # removed meanwhile
            total[each.kind] += each.bytes
            if each.kind != "digests":
                days = (now - each.used) / DAY
                show(
                    f"{each.kind:<8} {each.path.name[:16]:<17}{each.bytes / 1e6:>12,.1f} MB, used "
                    f"{days:.1f} days ago  {each.note}".rstrip()
                )
    for kind, size in total.items():
        show(f"{cache_folder(kind)}: {size / 1e6:,.1f} MB")
    return total


def removed(days: float) -> Json:
    """Remove what was not used for so many days; print and return the bytes that it freed.

    What a process may have left half done is removed after a day at the earliest: another one may
    be making it.
    """
    now, total = time.time(), dict.fromkeys(NAMED, 0)
    for each in entries():
        age = max(days, 1.0) if each.path.name.startswith(".") else days
        with suppress(FileNotFoundError):
            if now - each.used >= age * DAY:
                total[each.kind] += each.remove()
    for kind, size in total.items():
        show(f"{cache_folder(kind)}: {size / 1e6:,.1f} MB removed")
    return total


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.caches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="remove")
    remove = commands.add_parser("remove", help="remove what was not used for some days")
    remove.add_argument("--older-than", type=within(Range(0.0)), required=True, metavar="DAYS")
    given = parser.parse_args(words)
    return cli.main(lambda: removed(given.older_than) if given.command else listed(), None)


if __name__ == "__main__":
    sys.exit(main())
