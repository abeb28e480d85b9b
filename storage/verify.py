"""verify: read a whole dump again and name every fault."""

import contextlib
import hashlib
import mmap
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from storage.corpus_list import LIST_FILE, list_file, read_list
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
from storage.index_files import (
    DUMP_INDEX,
    SHARD_INDEX,
    SHARD_INDEX_BYTES,
    checked,
    index_in_dump,
    shard_index,
)
from storage.manifest import TOKENIZER, TOKENIZER_FILE, Dump, Manifest, Shard
from storage.parallel import in_order
from storage.parsing import MARKER_BYTES, to_json
from storage.row_keys import RowKeys, key_of
from storage.scan import file_bytes, scan
from storage.shard_reader import ShardReader
from storage.store import Store
from storage.topk import check_topk
from storage.verify_small import small_faults


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

    def add(self, shard: Shard, fault: str | None) -> None:
        """Count a shard, with its rows if nothing is wrong with it."""
        self.shards += 1
        if fault:
            self.faults.append(fault)
            return
        self.rows += shard.rows
        self.tokens += shard.tokens
        self.targets += shard.positions if shard.masked else 0


def verify(
    path: str | os.PathLike[str],
    progress: Callable[[Shard], None] | None = None,
    *,
    partial: bool = False,
    jobs: int = 1,
) -> Report:
    """Read a finished dump again; check hashes, plan, every row, duplicate rows and stray files.

    Every file that FORMAT.md describes is read; those of the tokenizer are compared with the
    manifest's sha256 of them, where it has any. `partial=True` checks the shards committed so far
    of an unfinished dump. `jobs` processes check the shards, each of which is downloaded once.
    Memory does not grow with the dump; temporary files take 24 bytes a row, and a remote shard for
    each process.

    Damage raises nothing: each fault is one line of the report, which names the file and, if known,
    the row. Raises IncompleteDump if the dump is missing or not finished, and StoreError.
    """
    report = Report()
    try:
        dump = Dump(path)
        data = None if partial else dump.manifest_bytes()
        manifest = None if data is None else dump.parsed(data)
        shards = list(manifest.shards) if manifest else dump.shards()
    except (IncompleteDump, StoreError):
        raise
    except StorageError as error:
        report.faults.append(str(error))
        return report
    files = {name: entry.bytes for name, entry in dump.store.entries().items()}
    report.faults += small_faults(dump, data, manifest, shards, files.keys())
    index = checked_index(dump, manifest, report) if manifest else None
    check = ShardCheck(dump, index, damaged_tables(dump, shards, report))
    items = [
        (number, shard, files.get(shard.file), shard_index(shard.file) in files)
        for number, shard in enumerate(shards)
    ]
    faults: dict[int, str | None] = {}
    with RowKeys() as keys, contextlib.closing(in_order(check, items, jobs)) as results:
        for (number, shard, *_), (fault, hashes) in zip(items, results, strict=True):
            faults[number] = fault
            keys.add(number, hashes)
            if progress:
                progress(shard)
        for number, (row, first) in keys.repeated().items():
            faults[number] = doubled(dump, shards[number], row, shards[first].file)
    for shard, fault in zip(shards, faults.values(), strict=True):
        report.add(shard, fault)
    named = {shard.file for shard in shards}
    markers = {f"{shard.name}.json" for shard in shards}
    tables = {tables_file(shard.tables) for shard in shards if shard.tables}
    indexes = set(map(shard_index, named))
    tokenizer = {TOKENIZER + name for name in manifest.tokenizer} if manifest else set()
    if list_file(dump.plan) in files:
        check_list(dump, report)
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
        elif LIST_FILE.fullmatch(name) and name != list_file(dump.plan):
            report.notes.append(f"{name}: the files of another plan's corpus; never read")
        elif TOKENIZER_FILE.fullmatch(name) and name not in tokenizer:
            report.notes.append(f"{name}: no manifest.json has its sha256; not checked")
        elif "/.writing-" in name or "/.creating-" in name:
            report.notes.append(f"{name}: temporary file of a writer; never read")
    return report


@dataclass(frozen=True)
class ShardCheck:
    """Checks one shard, given with its number, the bytes of its file in the listing, None where it
    has none, and whether it has an index beside it.

    Returns one line that says what is wrong with it, or None, and the keys of its rows up to there.
    """

    dump: Dump
    index: Index | None
    damaged: set[str | None]

    def __call__(self, item: tuple[int, Shard, int | None, bool]) -> tuple[str | None, bytes]:
        number, shard, size, has_index = item
        keys: list[bytes] = []
        try:
            fault = missing(self.dump.store, shard, size)
            if fault is None and shard.tables not in self.damaged:
                with file_bytes(self.dump, shard, use_cache=False) as data:
                    fault = check_rows(self.dump, shard, data, keys)
                    indexes = [(self.index, number)] if self.index is not None else []
                    if has_index and fault is None:
                        indexes += own_index(self.dump, shard)
                    fault = fault or check_places(self.dump, shard, data, indexes)
        except StoreError:
            raise
        except StorageError as error:
            fault = str(error)
        except FileNotFoundError:
            fault = f"{shard.file}: removed while it was read"
        return fault, b"".join(keys)


def doubled(dump: Dump, shard: Shard, row: int, first: str) -> str:
    """One line that says that the file `first` has a row of this shard already."""
    reader = ShardReader(dump, shard)
    group = reader.group_of(row)
    record = reader.record(reader.read_group(group), group, row)
    return (
        f"{shard.file}, row {row}: document {record.doc_id!r}, chunk {record.chunk} is already in "
        f"{first}"
    )


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


def checked_index(dump: Dump, manifest: Manifest, report: Report) -> Index | None:
    """The index in the dump's directory, if there is one; a damaged one is a fault."""
    try:
        index = index_in_dump(dump.store, manifest.fingerprint, dump.plan_sha256)
        if index is not None and len(index.shards) != len(manifest.shards):
            raise index.damaged(
                f"{len(index.shards)} shards, the manifest has {len(manifest.shards)}"
            )
    except StoreError:
        raise
    except StorageError as error:
        report.faults.append(str(error))
        return None
    return index


def check_list(dump: Dump, report: Report) -> None:
    """A damaged list of the corpus's files is a fault."""
    try:
        read_list(dump.store, dump.plan)
    except StoreError:
        raise
    except StorageError as error:
        report.faults.append(str(error))


def own_index(dump: Dump, shard: Shard) -> list[tuple[Index, int]]:
    """The index beside a shard, where it is still there, with the shard's number in it.

    Raises CorruptShard, CorruptIndex, FormatVersionError and StoreError.
    """
    name = shard_index(shard.file)
    data = dump.store.read(name, SHARD_INDEX_BYTES)
    if data is None:
        return []
    sha256 = str(shard.marker["sha256"])
    return [(checked(data, name, sha256, dump.plan_sha256, shard.masked, 1), 0)]


def check_places(
    dump: Dump, shard: Shard, data: bytes | mmap.mmap, indexes: list[tuple[Index, int]]
) -> str | None:
    """What is wrong with the heads of a good shard's rows, or with an index, or None.

    `indexes` are given with the shard's number in each.
    """
    try:
        found = scan(dump, shard, data)
        for index, number in indexes:
            index.check_shard(number, *shard.counts)
            if not agrees(index, number, found):
                return f"{index.name}: other places than the rows of {shard.file} have"
    except Unindexable as error:
        return f"{shard.file}: {error}" if indexes else None
    return None


def missing(store: Store, shard: Shard, size: int | None) -> str | None:
    """What is wrong with the marker, or with a file of `size` bytes, or None."""
    marker = store.read(f"{shard.name}.json", MARKER_BYTES)
    if marker is None and size is None:
        return f"{shard.name}.json: missing, and so is its data file {shard.file}"
    if marker is None:
        return f"{shard.name}.json: missing, though its data file {shard.file} exists"
    if marker != to_json(shard.marker):
        return f"{shard.name}.json: the marker differs from the one in manifest.json"
    if size is None:
        return f"{shard.file}: missing, though {shard.name}.json names it"
    if size != shard.marker["bytes"]:
        return f"{shard.file}: {size} bytes, the marker says {shard.marker['bytes']}"
    return None


def check_rows(dump: Dump, shard: Shard, data: bytes | mmap.mmap, keys: list[bytes]) -> str | None:
    """What is wrong with the data file, or None; adds the keys of the rows that were read."""
    reader = ShardReader(dump, shard, data=data)
    found: Counter[str] = Counter()
    for number, record in enumerate(reader):
        keys.append(key_of(record.doc_id, record.chunk))
        try:  # readers skip these slow checks, such as an id that appears twice
            check_topk(record.topk, reader.vocab_size)
        except InvalidRecord as error:
            return f"{shard.file}, row {number}: {error}"
        found["tokens"] += len(record.input_ids)
        found["positions"] += len(record.topk)
        found["entries"] += len(record.topk.ids)
    if hashlib.sha256(data).hexdigest() != shard.marker["sha256"]:
        return f"{shard.file}: the sha256 is not the marker's: the file was changed after commit"
    for what in ("tokens", "positions", "entries"):
        if found[what] != shard.marker[what]:
            return f"{shard.file}: {found[what]} {what}, the marker says {shard.marker[what]}"
    return None
