"""The sha256 of files; that of many bytes is remembered, so that they are read whole once.

A large file is known again by its place, its size, its inode, the times of its last changes, and a
sample of its bytes. A program can set back the time of a file's content (mtime), but not that of
the last change to it or to what is known of it (ctime). A file that changed a moment ago is read
whole: it might change again within the clock's resolution. Small files that are many bytes together
are known again as one large file is.
"""

import hashlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.json_files import read_object, write_json
from pipeline.types import Json

LARGE = 16 << 20  # bytes; fewer are read faster than they are worth remembering
SETTLED = 10.0  # seconds since the last change; file systems tell times to 2 seconds or better
SAMPLES, SAMPLE = 64, 4096  # places, bytes at each


def digest_of(path: str, memory: Path | None = None) -> str:
    """`digests_of` one file."""
    return digests_of([path], memory)[0]


def digests_of(paths: list[str], memory: Path | None = None) -> list[str]:
    """Hexadecimal sha256 of the content of each file. Raises OSError.

    `memory` is the folder that remembers; None reads the files whatever is known.
    """
    if memory is None:
        return list(map(whole, paths))
    stamps = {path: stamp(path) for path in paths}
    small = [path for path in stamps if stamps[path]["bytes"] < LARGE]
    groups = [[path] for path in stamps if stamps[path]["bytes"] >= LARGE]
    if sum(stamps[path]["bytes"] for path in small) >= LARGE:
        groups.append(small)
        small = []
    found = {path: whole(path) for path in small}
    for group in groups:
        known = remembered(group, [stamps[path] for path in group], memory)
        found |= dict(zip(group, known, strict=True))
    return [found[path] for path in paths]


def whole(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(paths: list[str], stamps: list[Json], memory: Path) -> list[str]:
    """The digests of files that are known again together, or read whole."""
    note, before = note_of(memory, paths), sha256([json.dumps(each) for each in stamps])
    known = recalled(note)
    found: list[str] = known.get("sha256", [])
    if known.get("stamp") == before and known.get("sample") == sample_of(*paths):
        return found
    found = list(map(whole, paths))
    settled = time.time_ns() - max(each["ctime"] for each in stamps) > SETTLED * 1e9
    if settled and list(map(stamp, paths)) == stamps:
        write_json(note, {"stamp": before, "sample": sample_of(*paths), "sha256": found})
    return found


def stamp(path: str) -> Json:
    """What changes with a file's content."""
    found = os.stat(path)
    return {
        "path": os.path.abspath(path),
        "bytes": found.st_size,
        "inode": found.st_ino,
        "device": found.st_dev,
        "mtime": found.st_mtime_ns,
        "ctime": found.st_ctime_ns,
    }


def sample_of(*paths: str) -> str:
    """sha256 of pieces that lie evenly over the bytes of files, the first and last among them."""
    starts = [0, *accumulate(map(os.path.getsize, paths))]
    digest, last = hashlib.sha256(), max(0, starts.pop() - SAMPLE)
    for number in range(SAMPLES):
        at = last * number // (SAMPLES - 1)
        which = bisect_right(starts, at) - 1
        with open(paths[which], "rb", buffering=0) as file:
            file.seek(at - starts[which])
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def note_of(memory: Path, paths: list[str]) -> Path:
    return memory / f"{sha256(map(os.path.abspath, paths))}.json"


def sha256(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def recalled(note: Path) -> Json:
    """A note; an empty one where there is none that can be read."""
    try:
        return read_object(note) or {}
    except ConfigError:
        return {}
