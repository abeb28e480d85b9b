"""Make the index of a shard from its rows; compare the rows' heads with the columns."""

import contextlib
import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage import row_head
from storage.data_file import MISSING, check_size
from storage.errors import CorruptShard, Unindexable
from storage.index import Index, Part, pack_index
from storage.index_files import committed_part
from storage.manifest import Dump, Manifest, Shard
from storage.places import Group, Places, start
from storage.row_head import RowHead
from storage.shard_reader import ShardReader, gate, target_counts, targets_of
from storage.store import mapped
from storage.topk import Int32s
from storage.whole_files import cached


def scan(
    dump: Dump, shard: Shard, data: bytes | mmap.mmap, reader: ShardReader | None = None
) -> Part:
    """What the index says of a shard, from the bytes of its data file.

    Raises CorruptShard, also where a row's head says other than its columns, and Unindexable.
    """
    reader = reader or ShardReader(dump, shard, data=data)
    groups = [
        group_of(reader.read_group(number), shard, dump, int(first), reader.has_samples)
        for number, first in enumerate(reader.starts[:-1])
    ]
    with gate(shard.file):
        tables = reader.own_tables() if "successors" in reader.columns else b""
        places = Places(data, reader.file.metadata)
        return places.part(groups, start(tables) if tables else b"", reader.has_samples)


def group_of(table: Any, shard: Shard, dump: Dump, first: int, has_samples: bool) -> Group:
    """A row group whose first row has the number `first`."""
    payloads = table.column("payload").to_pylist()
    samples = table.column("samples").to_pylist() if has_samples else [b""] * len(payloads)
    found = list(heads_of(table, payloads, samples, shard, dump, first))
    return Group(
        [tokens for tokens, _ in found],
        list(map(start, payloads)),
        list(map(start, samples)) if has_samples else [],
        [head for _, head in found],
        target_counts(table).tolist() if shard.masked else [],
    )


def heads_of(
    table: Any, payloads: list[bytes], samples: list[bytes], shard: Shard, dump: Dump, first: int
) -> Iterator[tuple[int, bytes]]:
    """(tokens, head) of each row of a group; the head is empty where the payload has it.

    Raises CorruptShard if the head in a payload says other than the columns.
    """
    for at, payload in enumerate(payloads):
        with gate(f"{shard.file}, row {first + at}"):
            input_ids: Int32s = table.column("input_ids")[at].values.to_numpy()
            own = RowHead(
                shard.name,
                first + at,
                dump.plan_sha256,
                table.column("doc_id")[at].as_py(),
                table.column("chunk")[at].as_py(),
                input_ids,
                zlib.crc32(samples[at]),
                targets_of(table, at, len(input_ids)),
            )
            if table.column("tokens")[at].as_py() != len(input_ids) or not len(input_ids):
                raise CorruptShard("the column tokens is not the length of input_ids")
            stored = row_head.find(payload)
            if stored is not None and not stored.same(own):
                raise CorruptShard("the head in the payload says other than the columns")
        yield len(input_ids), b"" if stored else own.pack(b"", payload)


def index_dump(dump: Dump, manifest: Manifest) -> Index:
    """The index of a finished dump. Reads the shards that have none beside them.

    Raises CorruptShard, Unindexable that names the shard, and StoreError.
    """
    parts = []
    for shard in manifest.shards:
        sha256 = str(shard.marker["sha256"])
        part = committed_part(dump.store, shard.file, sha256, dump.plan_sha256, shard.masked)
        parts.append(part or scan_file(dump, shard))
    data = pack_index(parts, manifest.fingerprint, dump.plan_sha256)
    return Index(data, "the new index", manifest.fingerprint, dump.plan_sha256)


def scan_file(dump: Dump, shard: Shard) -> Part:
    """As scan, reading the file."""
    try:
        with file_bytes(dump, shard) as data:
            return scan(dump, shard, data)
    except Unindexable as error:
        raise Unindexable(f"{shard.file}: {error}") from None
    except FileNotFoundError:
        raise CorruptShard(f"{shard.file}: {MISSING}") from None


@contextlib.contextmanager
def file_bytes(dump: Dump, shard: Shard, use_cache: bool = True) -> Iterator[bytes | mmap.mmap]:
    """All bytes of a data file, mapped. A remote one is downloaded once, or is in the cache.

    Raises FileNotFoundError, CorruptShard and StoreError.
    """
    store = dump.store
    local: str | Path | None = store.regular(shard.file) if store.local else None
    if use_cache:
        local = local or cached(store, shard.file, shard.marker["sha256"])
    if local is None:
        data = store.fetched(shard.file)
    else:
        with store.explaining("read", shard.file, but=FileNotFoundError):
            data = mapped(local)
    with gate(shard.file):
        check_size(shard, len(data))
    yield data
