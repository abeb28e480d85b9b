"""verify: re-read everything and name every fault."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from storage.errors import IncompleteDump, StorageError
from storage.manifest import Dump, Shard, to_json
from storage.shard import ShardReader
from storage.store import Store


@dataclass
class Report:
    """What verify found: totals, faults (damage), notes (harmless leftovers)."""

    rows: int = 0
    tokens: int = 0
    shards: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults


def verify(path: str | os.PathLike[str], progress: Callable[[Shard], None] | None = None) -> Report:
    """Re-read a finished dump: hashes, row counts, plan, decodability, doubled rows, stray files.

    Never raises for damage: each fault is one line of the report that names the file and, where
    there is one, the row. Raises IncompleteDump where there is no dump or it is not finished.
    """
    dump = Dump(path)
    report = Report()
    try:
        manifest = dump.manifest()
    except IncompleteDump:
        raise
    except StorageError as error:
        report.faults.append(str(error))
        return report
    files = dump.store.files()
    plan_sha256 = hashlib.sha256(to_json(dump.plan)).hexdigest()
    seen: dict[tuple[str, int], str] = {}
    for shard in manifest.shards:
        fault = check_shard(dump.store, shard, files, plan_sha256, seen, report)
        if fault:
            report.faults.append(fault)
        report.shards += 1
        if progress:
            progress(shard)
    named = {shard.file for shard in manifest.shards}
    for name, size in sorted(files.items()):
        if name.endswith(".parquet") and name not in named:
            report.notes.append(f"{name}: {size} bytes that no marker names; never read")
        elif "/.writing-" in name or "/.creating-" in name:
            report.notes.append(f"{name}: left over by a writer that died; never read")
    return report


def check_shard(
    store: Store,
    shard: Shard,
    files: dict[str, int],
    plan_sha256: str,
    seen: dict[tuple[str, int], str],
    report: Report,
) -> str | None:
    """One line that says what is wrong with the shard, or None."""
    if store.read(f"{shard.name}.json") != to_json(shard.marker):
        return f"{shard.name}.json: the marker is not the one in the manifest"
    if shard.file not in files:
        return f"{shard.file}: missing, though {shard.name}.json names it"
    if files[shard.file] != shard.marker["bytes"]:
        return f"{shard.file}: {files[shard.file]} bytes, {shard.marker['bytes']} were committed"
    digest = hashlib.sha256()
    with store.fs.open(store / shard.file, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    damaged = digest.hexdigest() != shard.marker["sha256"]
    try:
        reader = ShardReader(store, shard)
        metadata = reader.file.metadata.metadata
        if metadata[b"shard"].decode() != shard.name:
            return f"{shard.file}: holds shard {metadata[b'shard'].decode()}: files were swapped"
        if metadata[b"plan_sha256"].decode() != plan_sha256:
            return f"{shard.file}: belongs to a dump of another plan"
        tokens = 0
        for number, record in enumerate(reader):
            key = (record.doc_id, record.chunk)
            if key in seen:
                return (
                    f"{shard.file}, row {number}: document {key[0]!r}, chunk {key[1]} stands "
                    f"in {seen[key]} already"
                )
            seen[key] = shard.file
            tokens += len(record.input_ids)
    except StorageError as error:
        return str(error)
    if damaged:
        return f"{shard.file}: sha256 differs from the marker's: the file was changed after commit"
    if tokens != shard.tokens:
        return f"{shard.file}: {tokens} tokens, the marker says {shard.tokens}"
    report.rows += shard.rows
    report.tokens += tokens
    return None
