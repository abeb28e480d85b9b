"""ShardWriter: write one data file and commit it."""

import hashlib
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage.data_file_writer import DataFileWriter
from storage.errors import CorruptShard, FormatVersionError
from storage.index_files import shard_index
from storage.manifest import Partition, Shard
from storage.own_tables import AllRows, Chooser, FirstRows
from storage.parsing import Json, to_json
from storage.pending_row import PendingRow, RowMaker, Sums
from storage.plan import masked
from storage.shard import CODECS, footer_crc32
from storage.shard_reader import check_footer, gate, target_counts
from storage.shared_tables import SharedTables
from storage.topk import Record

# What a random read costs without an index. Version 1 learns its ranks from the first one.
ROW_GROUP_TOKENS = 16_384
SPARSE = 64  # tokens that count as one position, where rows have masks


def chooser_of(partition: Partition, index: int) -> Chooser:
    """What chooses the tables of a shard. Raises FormatVersionError for an unknown codec."""
    codec = str(partition.dump.plan.get("codec", "v1"))
    vocab_size = int(partition.dump.plan["vocab_size"])
    if codec == "v1":
        return FirstRows(vocab_size)
    if codec == "v2":
        return AllRows(vocab_size)
    if codec == "v3":
        return SharedTables(partition, index)
    raise FormatVersionError(
        f"the plan's codec is {codec!r}, this release writes {CODECS}; update mol-distill"
    )


class ShardWriter:
    """Writes the next shard of a partition to a file of its own, then commits it.

        writer = ShardWriter(partition)
        writer.write(record)
        marker = writer.commit(cursor={"document": 17})

    Readers see nothing before `commit`. A writer that dies leaves at most one file, which no
    marker names, and tables that no marker names yet. If another writer has committed the same
    shard first, `commit` discards its own file and returns the other's marker.

    The plan's `codec` chooses the version of the payloads, "v1" by default. Rows are in memory
    until their tables are chosen: one row group in "v1", the whole shard in "v2" (6 bytes per
    entry, and about 20 while it writes), a row group or LEARN_POSITIONS in "v3" (shared_tables).
    """

    def __init__(self, partition: Partition, index: int | None = None) -> None:
        self.partition = partition
        self.index = partition.next if index is None else index
        self.name = f"{partition.name}/{self.index:05d}"
        plan = partition.dump.plan
        self.draws, self.masked = int(plan.get("samples", 0)), masked(plan)
        self.chooser = chooser_of(partition, self.index)
        self.maker, self.sums = RowMaker(plan, self.name), Sums()
        self.pending: list[PendingRow] = []
        self.pending_tokens = self.pending_positions = 0
        self.file: DataFileWriter | None = None  # once its tables are chosen

    def write(self, record: Record) -> None:
        """Add a row. Raises InvalidRecord that names the document if it must not be stored."""
        row, topk = self.maker.make(record)
        self.sums.add(row, topk)
        self.pending.append(row)
        self.pending_tokens += len(row.input_ids)
        self.pending_positions += len(topk)
        if self.size(self.pending_tokens, self.pending_positions) >= ROW_GROUP_TOKENS:
            self.flush(last=False)

    @property
    def learnt(self) -> int:
        """Size of the shard so far in learnt tokens, which `shard_tokens` of a plan limits.

        Without masks all tokens count. With them, the targets do, and where these are few, a 64th
        of the tokens.
        """
        return self.size(self.sums.tokens, self.sums.positions)

    def size(self, tokens: int, positions: int) -> int:
        """As `learnt`, of rows of that many tokens and positions."""
        return max(positions, tokens // SPARSE) if self.masked else tokens

    def flush(self, last: bool = True) -> None:
        """Write the pending rows, if their tables can be chosen; the `last` ones always can."""
        if self.file is None:
            size = self.size(self.pending_tokens, self.pending_positions)
            chosen = self.chooser.choose(self.pending, size, last)
            if chosen is None:
                return
            self.file = DataFileWriter(self.partition, self.name, chosen)
        while self.pending:
            self.write_group(self.file)

    def write_group(self, file: DataFileWriter) -> None:
        """Write one row group of the pending rows."""
        size = tokens = positions = 0
        while size < len(self.pending) and self.size(tokens, positions) < ROW_GROUP_TOKENS:
            tokens += len(self.pending[size].input_ids)
            positions += len(self.pending[size].grid.counts)
            size += 1
        rows, self.pending = self.pending[:size], self.pending[size:]
        file.write(rows)
        self.pending_tokens -= tokens
        self.pending_positions -= positions

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes per token written so far; None before the first row group."""
        return self.file.bytes / self.file.tokens if self.file and self.file.tokens else None

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
            local = self.file.local
            self.file.close()
            marker = {
                "file": f"{self.index:05d}-{uuid.uuid4().hex[:12]}.parquet",
                "sha256": sha256_of(local),
                "bytes": local.stat().st_size,
                "footer_crc32": footer_of(local),
                **self.file.chosen.marker,
                **self.sums.marker(self.draws),
                "cursor": cursor,
                **(stats or {}),
            }
            shard = self.partition.dump.committed(self.name, marker)
            check_rows(local, shard, self.file.file.schema)
            target = f"{self.partition.name}/{marker['file']}"
            index = self.file.index(str(marker["sha256"]))
            self.partition.dump.check_plan()
            store.publish(local, target)
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

    def abort(self) -> None:
        """Discard the open file and its rows. Committed shards stay."""
        if self.file is not None:
            self.file.abort()
        self.pending, self.file = [], None


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
