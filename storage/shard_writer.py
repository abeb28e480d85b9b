"""ShardWriter: write one data file and commit it."""

import contextlib
import hashlib
import mmap
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import row_head
from storage.codec import samples as sampled
from storage.codec.codec import pack, unpack
from storage.codec.frames import Limits
from storage.codec.grid import Grid, dequantise, quantise
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import Successors, tables_of_row
from storage.errors import CorruptPayload, CorruptShard, FormatVersionError, InvalidRecord
from storage.index import pack_index
from storage.index_files import shard_index
from storage.manifest import Partition, Shard
from storage.parsing import MASS_BINS, MOST_K, Json, to_json
from storage.places import Group, Places, start
from storage.plan import masked
from storage.row_head import RowHead
from storage.shard import FORMATS, SCHEMA, footer_crc32, pack_ranks, schema_of
from storage.shard_reader import check_footer, gate, target_counts
from storage.targets import Bools, pack_mask, positions_of
from storage.topk import Int32s, Record, TopK, codec_kl

# What a random read costs without an index. Version 1 learns its ranks from the first one.
ROW_GROUP_TOKENS = 16_384
SPARSE = 64  # tokens that count as one position, where rows have masks
LEAVES = ("doc_id", "chunk", "tokens", "input_ids.list.element", "payload", "targets")
PAYLOADS = ("payload", "samples", "successors")  # already compressed


class PendingRow(NamedTuple):
    """A checked row that is not in the file yet."""

    doc_id: str
    chunk: int
    input_ids: Int32s
    samples: bytes  # encoded; empty without samples
    grid: Grid
    targets: Bools | None  # None in a dump without masks


class ShardWriter:
    """Writes the next shard of a partition to a file of its own, then commits it.

        writer = ShardWriter(partition)
        writer.write(record)
        marker = writer.commit(cursor={"document": 17})

    Readers see nothing before `commit`. A writer that dies leaves at most one file, which no
    marker names. If another writer has committed the same shard first, `commit` discards its own
    file and returns the other's marker.

    The plan's `codec` chooses the version of the payloads, "v1" by default. "v1" writes row group
    after row group. "v2" learns its tables from the whole shard, so it keeps the rows in memory
    until `commit`: 6 bytes per entry, and about 20 while it writes.
    """

    def __init__(self, partition: Partition, index: int | None = None) -> None:
        self.partition = partition
        self.index = len(partition.shards) if index is None else index
        self.name = f"{partition.name}/{self.index:05d}"
        plan = partition.dump.plan
        self.vocab_size, self.step = int(plan["vocab_size"]), float(plan["step"])
        self.k = int(plan.get("k", min(self.vocab_size, MOST_K)))
        self.codec = str(plan.get("codec", "v1"))
        self.draws, self.masked = int(plan.get("samples", 0)), masked(plan)
        if self.codec not in FORMATS.values():
            raise FormatVersionError(
                f"the plan's codec is {self.codec!r}, this release writes v1 and v2; update "
                "mol-distill"
            )
        self.rows = self.tokens = self.positions = self.entries = 0
        self.sampled_ids = self.sample_bytes = 0
        self.mass = self.kl_sum = self.kl_max = 0.0
        self.histogram = np.zeros(MASS_BINS, np.int64)
        self.pending: list[PendingRow] = []
        self.pending_tokens = self.pending_positions = 0
        self.tables: Ranks | Successors | None = None
        self.file: pq.ParquetWriter | None = None
        self.local: Path | None = None
        self.groups: list[Group] = []  # written
        self.successors = b""  # the start of version 2's tables
        self.flushed_rows = self.flushed_tokens = self.flushed_bytes = 0

    def write(self, record: Record) -> None:
        """Add a row. Raises InvalidRecord that names the document if it must not be stored."""
        where = f"document {record.doc_id!r}, chunk {record.chunk}"
        targets = self.mask_of(record, where)
        positions = len(positions_of(targets, len(record.input_ids)))
        if len(record.topk) != positions:
            learnt = f", {positions} of them targets," if self.masked else ""
            raise InvalidRecord(
                f"{where}: {len(record.input_ids)} tokens{learnt} need {positions} distributions, "
                f"found {len(record.topk)}"
            )
        mass = record.topk.kept_mass()
        broken = ~np.isfinite(mass) | np.isnan(record.topk.tail_logprob)
        if broken.any():
            at = int(np.flatnonzero(broken)[0])
            raise InvalidRecord(
                f"{where}: the teacher gave NaN or Inf at position {at}; this shard is not "
                "committed. Check the model's weights, or load it in float32"
            )
        ids = np.asarray(record.input_ids, np.int32)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InvalidRecord(
                f"{where}: expected input ids from 0 to {self.vocab_size - 1}, found {ids.min()} "
                f"to {ids.max()}; use the model's own tokenizer"
            )
        longest = int(record.topk.counts.max(initial=0))
        if longest > self.k:
            raise InvalidRecord(
                f"{where}: {longest} entries at a position, the plan has k {self.k}"
            )
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
        self.pending.append(
            PendingRow(record.doc_id, record.chunk, ids, samples, grid.narrow(), targets)
        )
        self.pending_tokens += len(ids)
        self.pending_positions += positions
        self.rows += 1
        self.tokens += len(ids)
        self.positions += positions
        self.entries += len(record.topk.ids)
        self.mass += float(mass.sum())
        self.histogram += np.histogram(np.clip(mass, 0, 1), MASS_BINS, (0, 1))[0]
        pending = self.size(self.pending_tokens, self.pending_positions)
        if self.codec == "v1" and pending >= ROW_GROUP_TOKENS:
            self.flush()

    @property
    def learnt(self) -> int:
        """Size of the shard so far in learnt tokens, which `shard_tokens` of a plan limits.

        Without masks all tokens count. With them, the targets do, and where these are few, a 64th
        of the tokens.
        """
        return self.size(self.tokens, self.positions)

    def size(self, tokens: int, positions: int) -> int:
        """As `learnt`, of rows of that many tokens and positions."""
        return max(positions, tokens // SPARSE) if self.masked else tokens

    def mask_of(self, record: Record, where: str) -> Bools | None:
        """The mask to store, bool [tokens]; None in a dump without masks. Raises InvalidRecord."""
        tokens, given = len(record.input_ids), record.targets
        if not tokens:
            raise InvalidRecord(f"{where}: no tokens; leave the row out")
        if given is not None and not self.masked:
            raise InvalidRecord(
                f"{where}: a mask of targets, but the plan has no `targets`: add them to the plan, "
                "or store the distributions of all tokens"
            )
        if not self.masked:
            return None
        mask = np.ones(tokens, bool) if given is None else np.array(given)
        if mask.dtype != bool or mask.shape != (tokens,):
            raise InvalidRecord(
                f"{where}: expected targets bool [{tokens}], a mark for each token, found "
                f"{mask.dtype} {list(mask.shape)}"
            )
        mask[0] = False  # nothing predicts it
        if not mask.any():
            raise InvalidRecord(
                f"{where}: expected a target among the tokens after the first, found none; leave "
                "the row out"
            )
        return mask

    def encode_samples(self, topk: TopK) -> bytes:
        """A record's samples, encoded. Raises CorruptShard if they do not decode to the same."""
        if topk.samples is None:
            return b""
        data = sampled.pack(topk.samples, self.vocab_size)
        if not sampled.unpack(data).same(topk.samples):
            raise CorruptShard(
                f"{self.name}: encoded samples do not decode to the same samples; nothing is "
                "committed. Please report this"
            )
        self.sampled_ids += len(topk.samples.ids)
        self.sample_bytes += len(data)
        return data

    def flush(self) -> None:
        """Write the pending rows: one row group in version 1, all rows in version 2."""
        if self.tables is None or self.file is None:
            metadata = {
                "format": f"mol-topk/{self.codec[1:]}".encode(),
                "shard": self.name.encode(),
                "plan_sha256": self.partition.dump.plan_sha256,
            }
            if self.codec == "v1":
                self.tables = Ranks.learn((row.grid for row in self.pending), self.vocab_size)
                metadata["ranks"] = pack_ranks(self.tables)
            else:
                rows = [(row.input_ids, row.grid) for row in self.pending]
                masks = [row.targets for row in self.pending]
                self.tables = Successors.learn(rows, self.vocab_size, masks)
            folder = self.partition.dump.store.staging_folder(self.partition.name)
            self.local = folder / f".writing-{self.name.replace('/', '-')}-{uuid.uuid4().hex}"
            with self.partition.dump.store.explaining("write", self.name):
                self.file = pq.ParquetWriter(
                    self.local,
                    schema_of(self.partition.dump.plan),
                    compression={
                        name: "none" if name in PAYLOADS else "zstd"
                        for name in (*LEAVES, *PAYLOADS)
                    },
                    compression_level={name: 9 for name in LEAVES if name not in PAYLOADS},
                    use_dictionary=False,
                    write_statistics=False,
                    write_page_checksum=True,
                    store_schema=False,  # the Parquet schema says it all
                )
            self.file.add_key_value_metadata(metadata)
        while self.pending:
            self.write_group()

    def write_group(self) -> None:
        """Encode and write one row group of the pending rows."""
        assert self.file is not None
        assert self.local is not None
        size = tokens = positions = 0
        while size < len(self.pending) and self.size(tokens, positions) < ROW_GROUP_TOKENS:
            tokens += len(self.pending[size].input_ids)
            positions += len(self.pending[size].grid.counts)
            size += 1
        rows, self.pending = self.pending[:size], self.pending[size:]
        # The slow parts of encoding release the GIL.
        numbers = range(self.flushed_rows, self.flushed_rows + size)
        with ThreadPoolExecutor(thread_name_prefix="encoding") as pool:
            payloads = list(pool.map(self.payload, rows, numbers))
        columns = [
            pa.array([row.doc_id for row in rows], pa.string()),
            pa.array([row.chunk for row in rows], pa.int32()),
            pa.array([len(row.input_ids) for row in rows], pa.int32()),
            pa.array([row.input_ids for row in rows], SCHEMA.field("input_ids").type),
            pa.array(payloads, pa.binary()),
        ]
        if self.masked:
            masks = [pack_mask(row.targets) for row in rows if row.targets is not None]
            columns.append(pa.array(masks, pa.binary()))
        if self.draws:
            columns.append(pa.array([row.samples for row in rows], pa.binary()))
        if isinstance(self.tables, Successors):
            first = self.tables.pack() if self.flushed_rows == 0 else None
            self.successors = self.successors or start(first or b"")
            columns.append(pa.array([first, *[None] * (size - 1)], pa.binary()))
        with self.partition.dump.store.explaining("write", self.name):
            self.file.write_table(pa.table(columns, schema=self.file.schema))
        samples = [start(row.samples) for row in rows] if self.draws else []
        tokens_of = [len(row.input_ids) for row in rows]
        targets = [len(row.grid.counts) for row in rows] if self.masked else []
        starts = list(map(start, payloads))
        self.groups.append(Group(tokens_of, starts, samples, targets=targets))
        self.pending_tokens -= tokens
        self.pending_positions -= positions
        self.flushed_rows += size
        self.flushed_tokens += tokens
        self.flushed_bytes = self.local.stat().st_size

    def payload(self, row: PendingRow, number: int) -> bytes:
        """Row `number`, encoded, with its head. Raises CorruptShard if it does not decode so."""
        assert self.tables is not None
        ranks = tables_of_row(self.tables, row.input_ids, row.targets)
        plan, crc = self.partition.dump.plan_sha256, zlib.crc32(row.samples)
        head = RowHead(
            self.name, number, plan, row.doc_id, row.chunk, row.input_ids, crc, row.targets
        )
        data = row_head.insert(pack(row.grid, ranks), head)
        limits = Limits(len(row.grid.counts), self.k, self.vocab_size)
        try:
            found = row_head.find(data)
            good = found is not None and found.same(head)
            good = good and unpack(data, ranks, limits).same(row.grid)
            fault = "" if good else "another row"
        except (CorruptPayload, CorruptShard) as error:
            fault = str(error)
        if fault:
            raise CorruptShard(
                f"{self.name}: document {row.doc_id!r}, chunk {row.chunk} does not decode to the "
                f"same row ({fault}); nothing is committed. Please report this"
            )
        return data

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes per token written so far; None before the first row group."""
        return self.flushed_bytes / self.flushed_tokens if self.flushed_tokens else None

    def commit(self, cursor: Json, stats: Json | None = None) -> Json:
        """Close, check, hash and publish the file, then create its marker. Returns the marker.

        `cursor` says where the next shard starts; readers find it in `Shard.marker["cursor"]`.
        `stats` adds entries to the marker. Raises StoreError, PlanMismatch and CorruptShard.
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
            shard = self.partition.dump.committed(self.name, marker)
            check_rows(self.local, shard, self.file.schema)
            target = f"{self.partition.name}/{marker['file']}"
            index = self.pack_index(marker["sha256"])
            self.partition.dump.check_plan()
            store.publish(self.local, target)
        except BaseException:
            self.abort()
            raise
        store.create(shard_index(target), index)
        # From here on a failure must leave the data file: its marker may exist all the same.
        if store.create(f"{self.name}.json", to_json(marker)):
            return marker
        for name in (target, shard_index(target)):
            store.remove(name)
        return self.partition.shard(self.index).marker

    def pack_index(self, sha256: str) -> bytes:
        """The index of the closed file."""
        assert self.local is not None
        with (
            gate(self.name),
            self.local.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            places = Places(data, pq.read_metadata(self.local))
            part = places.part(self.groups, self.successors, self.draws > 0)
        return pack_index([part], sha256, self.partition.dump.plan_sha256)

    def abort(self) -> None:
        """Discard the open file and its rows. Committed shards stay."""
        with contextlib.suppress(OSError):  # a full disk must not hide the first error
            if self.file is not None:
                self.file.close()
        with contextlib.suppress(OSError):
            if self.local is not None:
                self.local.unlink(missing_ok=True)
        self.pending, self.file, self.local = [], None, None


def check_rows(local: Path, shard: Shard, schema: pa.Schema) -> None:
    """Read a file back before it is published. Raises CorruptShard if readers would refuse it."""
    with gate(shard.name), pq.ParquetFile(local, page_checksum_verification=True) as file:
        check_footer(file, shard, schema)
        columns = ["tokens", "targets"] if shard.masked else ["tokens"]
        table = file.read(columns=columns)
        tokens = table.column("tokens").to_numpy()
        if (len(tokens), int(tokens.sum())) != (shard.rows, shard.tokens):
            raise CorruptShard(
                f"wrote {shard.rows} rows and {shard.tokens} tokens, read back {len(tokens)} and "
                f"{int(tokens.sum())}: is the disk full?"
            )
        targets = int(target_counts(table).sum())
        if shard.masked and targets != shard.positions:
            raise CorruptShard(
                f"wrote {shard.positions} targets, read back {targets}: is the disk full?"
            )


def footer_of(path: Path) -> int:
    """CRC-32 of a local file's footer."""
    with path.open("rb") as file:
        return footer_crc32(file)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
