"""The sha256 of files; that of a large file is remembered, so that it is read whole once.

A large file is known again by its place, its size, its inode, the times of its last changes, and a
sample of its bytes. A program can set back the time of a file's content (mtime), but not that of
the last change to it or to what is known of it (ctime). A file that changed a moment ago is read
whole: it might change again within the clock's resolution.
"""

import hashlib
import os
import time
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.json_files import read_object, write_json
from pipeline.types import Json

LARGE = 16 << 20  # bytes; a smaller file is read faster than it is worth remembering
SETTLED = 10.0  # seconds since the last change; file systems tell times to 2 seconds or better
SAMPLES, SAMPLE = 64, 4096  # places, bytes at each


def digest_of(path: str, memory: Path | None = None) -> str:
    """Hexadecimal sha256 of a file's content. Raises OSError.

    `memory` is the folder that remembers large files; None reads the file whatever is known.
    """
    before = stamp(path)
    note = note_of(memory, path) if memory and before["bytes"] >= LARGE else None
    if note:
        known = recalled(note)
        if known.get("stamp") == before and known.get("sample") == sample_of(path):
            return str(known["sha256"])
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settled = time.time_ns() - before["ctime"] > SETTLED * 1e9
    if note and settled and stamp(path) == before:
        write_json(note, {"stamp": before, "sample": sample_of(path), "sha256": digest})
    return digest


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


def sample_of(path: str) -> str:
    """sha256 of pieces that lie evenly over a file, its start and its end among them."""
    digest, last = hashlib.sha256(), os.path.getsize(path) - SAMPLE
    with open(path, "rb", buffering=0) as file:
        for number in range(SAMPLES):
            file.seek(max(0, last) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def note_of(memory: Path, path: str) -> Path:
    return memory / f"{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()}.json"


def recalled(note: Path) -> Json:
    """A note; an empty one where there is none that can be read."""
    try:
        return read_object(note) or {}
    except ConfigError:
        return {}
