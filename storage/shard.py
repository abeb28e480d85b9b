"""One Parquet data file: its schema, ShardWriter, and access to its rows."""

import contextlib
import hashlib
import struct
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from storage.codec import samples as sampled
from storage.codec.codec import decode, pack, unpack
from storage.codec.grid import Grid, dequantise, quantise
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import Row, Successors
from storage.data_file import open_source
from storage.errors import (
    CorruptPayload,
    CorruptShard,
    FormatVersionError,
    InvalidRecord,
    StorageError,
)
from storage.manifest import Json, Partition, Shard, to_json
from storage.store import Store
from storage.topk import Int32s, Record, TopK, check_samples_belong, codec_kl

SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("chunk", pa.int32(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        pa.field("payload", pa.binary(), nullable=False),
    ]
)
SUCCESSORS = pa.field("successors", pa.binary())  # version 2's tables: one value, in the first row
SAMPLES = pa.field("samples", pa.binary(), nullable=False)  # only where the plan has samples
FORMATS = {b"mol-topk/1": "v1", b"mol-topk/2": "v2"}
LEAVES = ("doc_id", "chunk", "tokens", "input_ids.list.element", "payload")
# A row group is what one random read costs; version 1 learns its ranks from the first one.
ROW_GROUP_TOKENS = 16_384
PAYLOADS = ("payload", "samples", "successors")  # compressed already
MASS_BINS = 20  # of the histogram of kept mass, over [0, 1]


class ShardWriter:
    """Writes the next shard of a partition under a name of its own, then commits it.

        writer = ShardWriter(partition)
        writer.write(record)
        marker = writer.commit(cursor={"document": 17})

    Nothing is visible to readers before `commit`, and a writer that dies leaves at most one file
    that no marker names. When another writer has committed the same shard first, `commit` removes
    its own file and returns the other's marker.

    The plan's `codec` says how payloads are written. "v1" (also where there is none) writes row
    group after row group; "v2" learns from the whole shard, so it keeps the rows until `commit`: 6
    bytes for each entry, and about 20 while it writes.
    """

    def __init__(self, partition: Partition, index: int | None = None) -> None:
        self.partition = partition
        self.index = len(partition.shards) if index is None else index
        self.name = f"{partition.name}/{self.index:05d}"
        plan = partition.dump.plan
        self.vocab_size, self.step = int(plan["vocab_size"]), float(plan["step"])
        self.codec = str(plan.get("codec", "v1"))
        self.draws = int(plan.get("samples", 0))
        if self.codec not in FORMATS.values():
            raise FormatVersionError(
                f"the plan's codec is {self.codec!r}; this release writes v1 and v2: update it"
            )
        self.rows = self.tokens = self.positions = self.entries = 0
        self.sampled_ids = self.sample_bytes = 0
        self.mass = self.kl_sum = self.kl_max = 0.0
        self.histogram = np.zeros(MASS_BINS, np.int64)
        # doc_id, chunk, input_ids, the encoded samples, the exact part
        self.pending: list[tuple[str, int, Int32s, bytes, Grid]] = []
        self.pending_tokens = 0
        self.tables: Ranks | Successors | None = None
        self.file: pq.ParquetWriter | None = None
        self.local: Path | None = None
        self.flushed_tokens = self.flushed_bytes = 0

    def write(self, record: Record) -> None:
        """Add a row. Raises InvalidRecord, naming the document, for what must not be stored."""
        where = f"document {record.doc_id!r}, chunk {record.chunk}"
        if len(record.topk) != len(record.input_ids) - 1:
            raise InvalidRecord(
                f"{where}: {len(record.input_ids)} tokens need {len(record.input_ids) - 1} "
                f"distributions, found {len(record.topk)}"
            )
        mass = record.topk.kept_mass()
        broken = ~np.isfinite(mass) | np.isnan(record.topk.tail_logprob)
        if broken.any():
            at = int(np.flatnonzero(broken)[0])
            raise InvalidRecord(
                f"{where}: the teacher gave NaN or Inf at position {at}; nothing of this shard "
                "is committed. Check the model's weights, or load it in float32"
            )
        ids = np.asarray(record.input_ids, np.int32)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InvalidRecord(f"{where}: input ids outside the vocabulary of {self.vocab_size}")
        drawn = record.topk.samples.draws if record.topk.samples else 0
        if drawn != self.draws:
            raise InvalidRecord(f"{where}: {drawn} draws, the plan has samples: {self.draws}")
        try:
            grid = quantise(record.topk, self.vocab_size, self.step)
        except InvalidRecord as error:
            raise InvalidRecord(f"{where}: {error}") from None
        kl = codec_kl(record.topk, dequantise(grid))
        self.kl_sum += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max(initial=0)))
        samples = self.encode_samples(record.topk)
        self.pending.append((record.doc_id, record.chunk, ids, samples, grid.narrow()))
        self.pending_tokens += len(ids)
        self.rows += 1
        self.tokens += len(ids)
        self.positions += len(record.topk)
        self.entries += len(record.topk.ids)
        self.mass += float(mass.sum())
        self.histogram += np.histogram(np.clip(mass, 0, 1), MASS_BINS, (0, 1))[0]
        if self.codec == "v1" and self.pending_tokens >= ROW_GROUP_TOKENS:
            self.flush()

    def encode_samples(self, topk: TopK) -> bytes:
        """The samples' bytes, which need no tables; what is committed has been read back."""
        if topk.samples is None:
            return b""
        data = sampled.pack(topk.samples, self.vocab_size)
        if not sampled.unpack(data).same(topk.samples):
            raise CorruptShard(f"{self.name}: samples read back as others; nothing is committed")
        self.sampled_ids += len(topk.samples.ids)
        self.sample_bytes += len(data)
        return data

    def flush(self) -> None:
        """Write the pending rows: one row group of version 1, all of them of version 2."""
        if self.tables is None or self.file is None:
            metadata = {
                "format": f"mol-topk/{self.codec[1:]}".encode(),
                "shard": self.name.encode(),
                "plan_sha256": hashlib.sha256(to_json(self.partition.dump.plan)).digest().hex(),
            }
            if self.codec == "v1":
                self.tables = Ranks.learn((row[-1] for row in self.pending), self.vocab_size)
                metadata["ranks"] = pack_ranks(self.tables)
            else:
                rows = [(input_ids, grid) for _, _, input_ids, _, grid in self.pending]
                self.tables = Successors.learn(rows, self.vocab_size)
            folder = self.partition.dump.store.staging_folder(self.partition.name)
            self.local = folder / f".writing-{self.name.replace('/', '-')}-{uuid.uuid4().hex}"
            with self.partition.dump.store.explaining("write", self.name):
                self.file = pq.ParquetWriter(
                    self.local,
                    schema_of(self.codec, self.draws > 0),
                    compression={
                        name: "none" if name in PAYLOADS else "zstd"
                        for name in (*LEAVES, *PAYLOADS)
                    },
                    compression_level={name: 9 for name in LEAVES if name not in PAYLOADS},
                    use_dictionary=False,
                    write_statistics=False,
                    write_page_checksum=True,
                    store_schema=False,  # Parquet's own says all there is to say
                )
            self.file.add_key_value_metadata(metadata)
        while self.pending:
            self.write_group()

    def write_group(self) -> None:
        """Encode as many of the pending rows as a row group holds."""
        assert self.file is not None
        assert self.local is not None
        size = tokens = 0
        while size < len(self.pending) and tokens < ROW_GROUP_TOKENS:
            tokens += len(self.pending[size][2])
            size += 1
        rows, self.pending = self.pending[:size], self.pending[size:]
        doc_ids, chunks, input_ids, samples, grids = zip(*rows, strict=True)
        # What takes time lets other threads run.
        with ThreadPoolExecutor(thread_name_prefix="encoding") as pool:
            payloads = list(pool.map(self.payload, input_ids, grids))
        columns = [
            pa.array(doc_ids, pa.string()),
            pa.array(chunks, pa.int32()),
            pa.array([len(ids) for ids in input_ids], pa.int32()),
            pa.array(input_ids, SCHEMA.field("input_ids").type),
            pa.array(payloads, pa.binary()),
        ]
        if self.draws:
            columns.append(pa.array(samples, pa.binary()))
        if isinstance(self.tables, Successors):
            first = self.tables.pack() if self.flushed_tokens == 0 else None
            columns.append(pa.array([first, *[None] * (size - 1)], pa.binary()))
        with self.partition.dump.store.explaining("write", self.name):
            self.file.write_table(pa.table(columns, schema=self.file.schema))
        self.pending_tokens -= tokens
        self.flushed_tokens += tokens
        self.flushed_bytes = self.local.stat().st_size

    def payload(self, input_ids: Int32s, grid: Grid) -> bytes:
        """A row's bytes; what is committed has been read back."""
        ranks = self.tables
        bound = ranks.row(input_ids) if isinstance(ranks, Successors) else ranks
        data = pack(grid, bound)
        if not unpack(data, bound).same(grid):
            raise CorruptShard(f"{self.name}: a row reads back as another; nothing is committed")
        return data

    @property
    def bytes_per_token(self) -> float | None:
        """Of what is on disk so far; None before the first row group."""
        return self.flushed_bytes / self.flushed_tokens if self.flushed_tokens else None

    def commit(self, cursor: Json, stats: Json | None = None) -> Json:
        """Close, check, hash and publish the file, then create its marker; returns the marker.

        `cursor` says where the next shard starts; it comes back in `Shard.marker["cursor"]`.
        """
        store = self.partition.dump.store
        try:
            if self.pending or self.file is None:
                self.flush()
            assert self.file is not None
            assert self.local is not None
            with store.explaining("write", self.name):
                self.file.close()
            marker = {
                "file": f"{self.index:05d}-{uuid.uuid4().hex[:12]}.parquet",
                "sha256": sha256_of(self.local),
                "bytes": self.local.stat().st_size,
                "footer_crc32": footer_of(self.local),
                "rows": self.rows,
                "tokens": self.tokens,
                "positions": self.positions,
                "entries": self.entries,
                **(
                    {"sampled_ids": self.sampled_ids, "sample_bytes": self.sample_bytes}
                    if self.draws
                    else {}
                ),
                "mass": self.mass,
                "mass_histogram": self.histogram.tolist(),
                "kl_sum": self.kl_sum,
                "kl_max": self.kl_max,
                "cursor": cursor,
                **(stats or {}),
            }
            check_rows(self.local, marker)
            target = f"{self.partition.name}/{marker['file']}"
            self.partition.dump.check_plan()
            store.publish(self.local, target)
        except BaseException:
            self.abort()
            raise
        # From here on a failure leaves the data file: its marker may be there all the same.
        if store.create(f"{self.name}.json", to_json(marker)):
            return marker
        store.remove(target)
        return self.partition.shard(self.index).marker

    def abort(self) -> None:
        """Drop the open file; what is committed stays."""
        with contextlib.suppress(OSError):  # a full disk must not keep the reason from being told
            if self.file is not None:
                self.file.close()
        with contextlib.suppress(OSError):
            if self.local is not None:
                self.local.unlink(missing_ok=True)
        self.pending, self.file, self.local = [], None, None


def schema_of(codec: str, has_samples: bool) -> pa.Schema:
    schema = SCHEMA.append(SAMPLES) if has_samples else SCHEMA
    return schema if codec == "v1" else schema.append(SUCCESSORS)


def check_rows(local: Path, marker: Json) -> None:
    """Read a file back before it is published: an unclosed or full-disk file must not pass."""
    with pq.ParquetFile(local, page_checksum_verification=True) as file:
        tokens = file.read(columns=["tokens"]).column(0).to_numpy()
    if (len(tokens), int(tokens.sum())) != (marker["rows"], marker["tokens"]):
        raise CorruptShard(
            f"{local.name}: {len(tokens)} rows and {int(tokens.sum())} tokens read back, "
            f"{marker['rows']} and {marker['tokens']} written: is the disk full?"
        )


def footer_crc32(file: Any) -> int:
    """Of a Parquet file's footer, which no checksum of Parquet's own covers."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little") + 8
    if length > size:
        raise CorruptShard(f"a footer of {length} bytes in a file of {size}")
    file.seek(size - length)
    return zlib.crc32(file.read(length))


def footer_of(path: Path) -> int:
    with path.open("rb") as file:
        return footer_crc32(file)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack_ranks(ranks: Ranks) -> bytes:
    """Hexadecimal, because Parquet's key-value metadata is text for most readers."""
    packed = zstandard.ZstdCompressor(level=19).compress(ranks.frequent.astype("<i4").tobytes())
    return (struct.pack("<I", ranks.vocab_size) + packed).hex().encode()


def unpack_ranks(value: bytes) -> Ranks:
    try:
        raw = bytes.fromhex(value.decode())
        (vocab_size,) = struct.unpack("<I", raw[:4])
        size = zstandard.frame_content_size(raw[4:])
        if not 0 <= size <= 4 * vocab_size <= 1 << 26:
            raise CorruptPayload(f"rank table of {size} bytes for a vocabulary of {vocab_size}")
        frequent = zstandard.ZstdDecompressor().decompress(raw[4:], max_output_size=size)
        return Ranks(np.frombuffer(frequent, "<i4"), vocab_size)
    except (ValueError, struct.error, zstandard.ZstdError) as error:
        raise CorruptPayload(f"rank table in the footer is damaged: {error}") from None


class ShardReader:
    """Rows of one committed data file; `samples=False` leaves theirs out."""

    def __init__(self, store: Store, shard: Shard, samples: bool = True) -> None:
        self.shard, self.name = shard, shard.file
        try:
            source = open_source(store, shard)
            expected = shard.marker.get("footer_crc32")
            if expected is not None and footer_crc32(source) != expected:
                raise CorruptShard("its footer is not the one that was committed")
            self.file = pq.ParquetFile(source, page_checksum_verification=True)
            metadata = self.file.metadata.metadata or {}
            if metadata.get(b"format") not in FORMATS:
                raise CorruptShard(
                    f"{self.name}: format {metadata.get(b'format')!r}; this release reads "
                    f"{', '.join(name.decode() for name in FORMATS)}"
                )
            self.codec = FORMATS[metadata[b"format"]]
            self._tables: Ranks | Successors | None = None
            if self.codec == "v1":
                self._tables = unpack_ranks(metadata[b"ranks"])
            self.has_samples = samples and "samples" in self.file.schema_arrow.names
        except FileNotFoundError:
            raise CorruptShard(
                f"{self.name}: the data file is missing, its marker is there; restore it, or "
                "remove the marker and run the dump again"
            ) from None
        except (pa.ArrowException, OSError, KeyError, ValueError, StorageError) as error:
            raise CorruptShard(f"{self.name}: not a readable shard ({error})") from None
        groups = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.cumsum([0, *groups])
        if self.starts[-1] != shard.rows:
            raise CorruptShard(
                f"{self.name}: {self.starts[-1]} rows, the marker says {shard.rows}: not the file "
                "that was committed"
            )

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Tokens of each row, without reading the payloads."""
        return np.asarray(self.read(columns=["tokens"]).column(0).to_numpy(), np.int32)

    def read(self, columns: list[str]) -> pa.Table:
        try:
            return self.file.read(columns=columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptShard(f"{self.name}: {error}") from None

    def group_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def read_group(self, group: int) -> pa.Table:
        try:
            names = [*SCHEMA.names, "samples"] if self.has_samples else SCHEMA.names
            return self.file.read_row_group(group, columns=names)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptShard(f"{self.name}, row group {group}: {error}") from None

    def ranks(self, input_ids: Int32s) -> Ranks | Row:
        """What decodes the payload of the row with these input_ids."""
        if self._tables is None:
            try:
                first = self.file.read_row_group(0, columns=["successors"]).column(0)[0]
                self._tables = Successors.unpack(first.as_py() or b"")
            except (pa.ArrowException, OSError, ValueError, IndexError, CorruptPayload) as error:
                raise CorruptShard(f"{self.name}: {error}") from None
        return self._tables if isinstance(self._tables, Ranks) else self._tables.row(input_ids)

    def record(self, table: pa.Table, group: int, row: int) -> Record:
        """Decode row `row` of the file from its row group's table."""
        at = row - int(self.starts[group])
        doc_id, chunk = table.column("doc_id")[at].as_py(), table.column("chunk")[at].as_py()
        where = f"{self.name}, row {row} (document {doc_id!r}, chunk {chunk})"
        input_ids = table.column("input_ids")[at].values.to_numpy()
        try:
            payload = table.column("payload")[at].as_buffer().to_pybytes()
            topk: TopK = decode(payload, self.ranks(input_ids))
            if self.has_samples:
                found = sampled.unpack(table.column("samples")[at].as_buffer().to_pybytes())
                check_samples_belong(topk, found)
                topk = replace(topk, samples=found)
        except StorageError as error:
            raise CorruptShard(f"{where}: {error}") from None
        if len(topk) != len(input_ids) - 1 or table.column("tokens")[at].as_py() != len(input_ids):
            raise CorruptShard(f"{where}: {len(input_ids)} tokens, but {len(topk)} distributions")
        return Record(doc_id, chunk, input_ids, topk)

    def __iter__(self) -> Iterator[Record]:
        for group in range(self.file.num_row_groups):
            table = self.read_group(group)
            for row in range(int(self.starts[group]), int(self.starts[group + 1])):
                yield self.record(table, group, row)
