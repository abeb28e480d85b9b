"""verify: read a whole dump again and name every fault."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from storage.dump_tables import TABLES_FILE, tables_file
from storage.errors import (
    IncompleteDump,
    InvalidRecord,
    StorageError,
    StoreError,
    Unindexable,
)
from storage.gc import MARKER
from storage.index import Index, agrees
from storage.index_files import DUMP_INDEX, SHARD_INDEX, index_in_dump, shard_index
from storage.manifest import Dump, Shard
from storage.parsing import MARKER_BYTES, to_json
from storage.scan import scan_file
from storage.shard_reader import ShardReader
from storage.store import Store
from storage.topk import check_topk


@dataclass
class Report:
    """What verify found: totals, faults (damage) and notes (harmless leftovers).

    targets  learnt tokens, where the dump has masks that say which
    """

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    shards: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults


def verify(
    path: str | os.PathLike[str],
    progress: Callable[[Shard], None] | None = None,
    *,
    partial: bool = False,
) -> Report:
    """Read a finished dump again; check hashes, plan, every row, duplicate rows and stray files.

    `partial=True` checks the shards committed so far of an unfinished dump. Damage raises nothing:
    each fault is one line of the report, which names the file and, if known, the row. Raises
    IncompleteDump if the dump is missing or not finished, and StoreError.
    """
    report = Report()
    try:
        dump = Dump(path)
        shards = dump.shards() if partial else list(dump.manifest().shards)
    except (IncompleteDump, StoreError):
        raise
    except StorageError as error:
        report.faults.append(str(error))
        return report
    files = {name: entry.bytes for name, entry in dump.store.entries().items()}
    seen: dict[tuple[str, int], str] = {}
    index = checked_index(dump, len(shards), report) if not partial else None
    damaged = damaged_tables(dump, shards, report)
    for number, shard in enumerate(shards):
        if shard.tables in damaged:
            fault = missing(dump.store, shard, files)
        else:
            fault = check_shard(dump, shard, files, seen, report)
            fault = fault or check_places(dump, shard, index, number)
        if fault:
            report.faults.append(fault)
        report.shards += 1
        if progress:
            progress(shard)
    named = {shard.file for shard in shards}
    markers = {f"{shard.name}.json" for shard in shards}
    tables = {tables_file(shard.tables) for shard in shards if shard.tables}
    indexes = set(map(shard_index, named))
    for name, size in sorted(files.items()):
        if MARKER.fullmatch(name) and name not in markers and not partial:
            report.faults.append(f"{name}: this marker is not in manifest.json")
        elif MARKER.fullmatch(name) and name not in markers:
            report.notes.append(f"{name}: an earlier shard has no marker yet; not read")
        elif name.endswith(".parquet") and name not in named:
            report.notes.append(f"{name}: no marker names this file of {size} bytes; never read")
        elif SHARD_INDEX.fullmatch(name) and name not in indexes:
            report.notes.append(f"{name}: the index of no committed shard; never read")
        elif DUMP_INDEX.fullmatch(name) and (index is None or name != index.name):
            report.notes.append(f"{name}: the index of another manifest.json; never read")
        elif TABLES_FILE.fullmatch(name) and name not in tables:
            report.notes.append(f"{name}: no marker names these tables; never read")
        elif "/.writing-" in name or "/.creating-" in name:
            report.notes.append(f"{name}: temporary file of a writer; never read")
    return report


def check_shard(
    dump: Dump,
    shard: Shard,
    files: dict[str, int],
    seen: dict[tuple[str, int], str],
    report: Report,
) -> str | None:
    """One line that says what is wrong with the shard, or None."""
    try:
        return missing(dump.store, shard, files) or check_rows(dump, shard, seen, report)
    except StoreError:
        raise
    except StorageError as error:
        return str(error)
    except FileNotFoundError:
        return f"{shard.file}: removed while it was read"


def damaged_tables(dump: Dump, shards: list[Shard], report: Report) -> set[str | None]:
    """The sha256 of tables that cannot be read; each is one fault, however many shards need it."""
    needed = Counter(shard.tables for shard in shards if shard.tables)
    damaged: set[str | None] = set()
    for sha256, number in needed.items():
        try:
            dump.tables.get(sha256)
        except StoreError:
            raise
        except StorageError as error:
            damaged.add(sha256)
            first = next(shard.file for shard in shards if shard.tables == sha256)
            report.faults.append(f"{error} ({number} shards need it, {first} is the first)")
    return damaged


def checked_index(dump: Dump, shards: int, report: Report) -> Index | None:
    """The index in the dump's directory, if there is one; a damaged one is a fault."""
    try:
        key = dump.manifest().fingerprint
        index = index_in_dump(dump.store, key, dump.plan_sha256)
        if index is not None and len(index.shards) != shards:
            raise index.damaged(f"{len(index.shards)} shards, the manifest has {shards}")
    except StoreError:
        raise
    except StorageError as error:
        report.faults.append(str(error))
        return None
    return index


def check_places(dump: Dump, shard: Shard, index: Index | None, number: int) -> str | None:
    """What is wrong with the heads of a good shard's rows, or with the index, or None."""
    if index is None and not dump.store.local:
        return None  # its bytes would be read once more
    try:
        found = scan_file(dump, shard)
        if index is not None:
            index.check_shard(number, *shard.counts)
            if not agrees(index, number, found):
                return f"{index.name}: other places than the rows of {shard.file} have"
    except Unindexable as error:
        return str(error) if index is not None else None
    except StoreError:
        raise
    except StorageError as error:
        return str(error)
    return None


def missing(store: Store, shard: Shard, files: dict[str, int]) -> str | None:
    """What is wrong with marker and size, or None."""
    marker = store.read(f"{shard.name}.json", MARKER_BYTES)
    if marker is None and shard.file not in files:
        return f"{shard.name}.json: missing, and so is its data file {shard.file}"
    if marker is None:
        return f"{shard.name}.json: missing, though its data file {shard.file} exists"
    if marker != to_json(shard.marker):
        return f"{shard.name}.json: the marker differs from the one in manifest.json"
    if shard.file not in files:
        return f"{shard.file}: missing, though {shard.name}.json names it"
    if files[shard.file] != shard.marker["bytes"]:
        return f"{shard.file}: {files[shard.file]} bytes, the marker says {shard.marker['bytes']}"
    return None


def check_rows(
    dump: Dump, shard: Shard, seen: dict[tuple[str, int], str], report: Report
) -> str | None:
    """What is wrong with the data file, or None; adds what was read to the report."""
    store = dump.store
    sha256 = store.attempt("read", shard.file, lambda: sha256_of(store, shard.file))
    reader = ShardReader(dump, shard)
    found: Counter[str] = Counter()
    for number, record in enumerate(reader):
        key = (record.doc_id, record.chunk)
        if key in seen:
            return (
                f"{shard.file}, row {number}: document {record.doc_id!r}, chunk "
                f"{record.chunk} is already in {seen[key]}"
            )
        seen[key] = shard.file
        try:  # readers skip these slow checks, such as an id that appears twice
            check_topk(record.topk, reader.vocab_size)
        except InvalidRecord as error:
            return f"{shard.file}, row {number}: {error}"
        found["tokens"] += len(record.input_ids)
        found["positions"] += len(record.topk)
        found["entries"] += len(record.topk.ids)
    if sha256 != shard.marker["sha256"]:
        return f"{shard.file}: the sha256 is not the marker's: the file was changed after commit"
    for what in ("tokens", "positions", "entries"):
        if found[what] != shard.marker[what]:
            return f"{shard.file}: {found[what]} {what}, the marker says {shard.marker[what]}"
    report.rows += shard.rows
    report.tokens += shard.tokens
    report.targets += shard.positions if shard.masked else 0
    return None


def sha256_of(store: Store, name: str) -> str:
    digest = hashlib.sha256()
    path = store.regular(name) if store.local else store / name
    with store.fs.open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
