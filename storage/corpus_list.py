"""The files of the corpus that a dump was planned from: a list beside plan.json.

    corpus-9f1c….json    the first 16 digits of the corpus's fingerprint in the plan

It tells which files hold the documents of a partition, so that its process need not open the
others. Readers of rows need no list, and a dump without one lacks nothing.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from storage.errors import CorruptShard, FormatVersionError
from storage.parsing import MOST, SHA256, Json, from_json, to_json, whole, wrong
from storage.plan import look_up
from storage.store import Store

VERSION = 1
LIST_FILE = re.compile(r"corpus-[0-9a-f]{16}\.json", re.ASCII)
SAMPLE = re.compile(r"[0-9a-f]{16}", re.ASCII)
MOST_FILES = 100_000
MOST_BYTES = 64 << 20  # of a list


@dataclass(frozen=True)
class CorpusList:
    """The files of a corpus, in their order; each list has one value for each file."""

    fingerprint: str
    """Of the corpus, as the plan has it."""
    paths: list[str]
    """Below the folder that holds all files."""
    sizes: list[int]
    """Bytes."""
    sha256: list[str]
    documents: list[int]
    """Also those that the plan skips."""
    samples: list[str]
    """16 hexadecimal digits of a sha256 over the first tokens of the file's first document."""
    ids_differ: bool
    """Whether no two documents of the corpus have the same id."""
    first: Json
    """What the first document of the corpus decides for all."""

    def pack(self) -> bytes:
        """The content of the file: JSON, with the sha256 of all else as `checksum`."""
        body = {"version": VERSION, **asdict(self)}
        return to_json({**body, "checksum": hashlib.sha256(to_json(body)).hexdigest()})

    @classmethod
    def unpack(cls, data: bytes, name: str) -> "CorpusList":
        """The list with this content.

        Raises CorruptShard for a damaged one, FormatVersionError for one of a later release.
        """
        body = from_json(data, name)
        version = whole(body, "version", name, 1)
        if version != VERSION:
            raise FormatVersionError(
                f"{name}: version {version}, this release reads version {VERSION}; use the release "
                "that wrote it"
            )
        for key, (expected, holds) in FIELDS.items():
            if not holds(body.get(key)):
                raise wrong(name, key, expected, body.get(key))
        found = cls(**{key: body[key] for key in FIELDS})
        if len({len(body[key]) for key in COLUMNS}) != 1:
            raise wrong(name, "paths", "as many as of the other lists", len(found.paths))
        for key in ("sizes", "documents"):
            if sum(body[key]) > MOST:
                raise wrong(name, key, f"at most {MOST} together", sum(body[key]))
        if found.pack() != data:
            raise CorruptShard(f"{name}: the checksum does not fit: the file was changed. {ADVICE}")
        return found


ADVICE = "Remove it: the next process that reads the whole corpus writes it again"


def each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list, of MOST_FILES at most, of such values."""
    return lambda found: (
        isinstance(found, list) and 0 < len(found) <= MOST_FILES and all(map(holds, found))
    )


def like(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, str) and pattern.fullmatch(found) is not None


def is_count(found: Any) -> bool:
    return type(found) is int and 0 <= found <= MOST


COLUMNS = {
    "paths": ("a list of names", each(lambda found: isinstance(found, str))),
    "sizes": ("a list of whole numbers", each(is_count)),
    "sha256": ("a list of 64 hexadecimal digits each", each(like(SHA256))),
    "documents": ("a list of whole numbers", each(is_count)),
    "samples": ("a list of 16 hexadecimal digits each", each(like(SAMPLE))),
}
FIELDS = {
    "fingerprint": ("64 hexadecimal digits", like(SHA256)),
    **COLUMNS,
    "ids_differ": ("true or false", lambda found: isinstance(found, bool)),
    "first": ("an object", lambda found: isinstance(found, dict)),
}
"""What each value must be, in words and as a test."""


def list_file(plan: Json) -> str | None:
    """The name of the list of a plan's corpus; None for a plan of another maker."""
    fingerprint, _ = look_up(plan, "corpus.fingerprint")
    return f"corpus-{fingerprint[:16]}.json" if like(SHA256)(fingerprint) else None


def read_list(store: Store, plan: Json) -> CorpusList | None:
    """The list of a plan's corpus, in one request; None where there is none.

    Raises CorruptShard for a damaged list or another corpus's, FormatVersionError, StoreError.
    """
    name = list_file(plan)
    data = None if name is None else store.read(name, MOST_BYTES)
    if name is None or data is None:
        return None
    found = CorpusList.unpack(data, name)
    if found.fingerprint != plan["corpus"]["fingerprint"]:
        raise wrong(name, "fingerprint", "that of the plan's corpus", found.fingerprint)
    return found
