"""ShardReader: the rows of one committed data file, and the gate that foreign bytes must pass.

A dump may come from anyone, with every checksum right. So what a file says is compared with its
marker and its plan before memory is allocated for it:

    check_footer     schema, rows, encodings and sizes of all columns, from the footer
    check_metadata   format, codec, shard and plan that the file was written for
    Limits           positions, entries and vocabulary of a row, before its payload is inflated
    RowDecoder       what a decoded row must be
"""

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.codec import samples as sampled
from storage.codec.codec import AnyTables, Known, decode, tables_of_row
from storage.codec.frames import Limits
from storage.data_file import MISSING, open_source
from storage.errors import (
    CorruptShard,
    FormatVersionError,
    StorageError,
    StoreError,
    Unindexable,
)
from storage.manifest import Dump, Shard
from storage.own_tables import OWN_TABLES
from storage.parsing import MOST_K, Json
from storage.shard import FORMATS, footer_crc32, schema_of
from storage.targets import Bools, positions_of, unpack_mask
from storage.topk import Int32s, Record, TopK, check_samples_belong

MOST_RATIO = 64  # of a column's bytes after and before decompression
FREE_BYTES = 1 << 24  # that a small column may inflate to, whatever the ratio
ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}  # the others can give any number of values for a byte


class ShardReader:
    """The rows of one committed data file; `samples=False` does not read their samples.

    `data` are the bytes of the file, where the caller has them.
    Raises CorruptShard that names the file, and the row where one row is damaged;
    FormatVersionError for the format of a later release; StoreError.
    """

    def __init__(
        self,
        dump: Dump,
        shard: Shard,
        samples: bool = True,
        data: bytes | mmap.mmap | None = None,
    ) -> None:
        self.dump, self.shard, self.name = dump, shard, shard.file
        self.decoder = RowDecoder(shard, dump.plan, samples)
        self.vocab_size, self.has_samples = self.decoder.vocab_size, self.decoder.has_samples
        self._tables: AnyTables | None = None
        with gate(self.name):
            try:
                given = data is not None
                source = pa.BufferReader(data) if given else open_source(dump.store, shard)
            except FileNotFoundError:
                raise CorruptShard(MISSING) from None
            expected = shard.marker.get("footer_crc32")
            if expected is not None and footer_crc32(source) != expected:
                raise CorruptShard("the CRC-32 of the footer is not the marker's")
            self.file = pq.ParquetFile(source, page_checksum_verification=True)
            metadata = self.file.metadata.metadata or {}
            self.codec = check_metadata(metadata, shard, dump)
            schema = schema_of(dump.plan)
            self.columns = schema.names
            check_footer(self.file, shard, schema)
            groups = range(self.file.num_row_groups)
            rows = [self.file.metadata.row_group(group).num_rows for group in groups]
            self.starts = np.cumsum([0, *rows])

    def lengths(self) -> Int32s:
        """int32 [rows]: tokens of each row. Reads no payloads."""
        with gate(self.name):
            tokens = self.file.read(columns=["tokens"]).column(0).to_numpy()
            if tokens.dtype != np.int32 or (tokens < 1).any() or tokens.sum() != self.shard.tokens:
                raise CorruptShard(
                    f"the column tokens does not add up to the marker's {self.shard.tokens} tokens"
                )
        return np.asarray(tokens)

    def target_counts(self) -> Int32s:
        """int32 [rows]: targets of each row; all its tokens without masks. Reads no payloads."""
        if not self.shard.masked:
            return self.lengths()
        with gate(self.name):
            counts = target_counts(self.file.read(columns=["targets"]))
            if counts.sum() != self.shard.positions:
                raise CorruptShard(
                    f"the column targets does not add up to the marker's {self.shard.positions} "
                    "positions"
                )
        return counts

    def group_of(self, row: int) -> int:
        """The row group that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def read_group(self, group: int) -> pa.Table:
        """The rows of a row group, still encoded."""
        unread = {"successors"} if self.has_samples else {"successors", "samples"}
        names = [name for name in self.columns if name not in unread]
        with gate(f"{self.name}, row group {group}"):
            table = self.file.read_row_group(group, columns=names)
            for name in names:
                if table.column(name).null_count:
                    raise CorruptShard(f"the column {name} holds nulls")
        return table

    def own_tables(self) -> bytes:
        """The tables that the file holds, packed; empty where it holds none."""
        return OWN_TABLES[self.codec].packed(self.file) if self.codec in OWN_TABLES else b""

    def tables(self) -> AnyTables:
        """What decodes the rows of the shard: its own tables, or those of the dump."""
        if self.shard.tables is not None:
            return self.dump.tables.get(self.shard.tables)
        if self._tables is None:
            self._tables = OWN_TABLES[self.codec].unpack(self.own_tables(), self.vocab_size)
        return self._tables

    def ranks(self, input_ids: Int32s, targets: Bools | None = None) -> Known:
        """The tables that decode the payload of the row with these input_ids and targets."""
        return tables_of_row(self.tables(), input_ids, targets)

    def record(self, table: pa.Table, group: int, row: int) -> Record:
        """Decode row `row` of the file from the table of its row group."""
        at = row - int(self.starts[group])
        with gate(f"{self.name}, row {row}"):
            doc_id, chunk = table.column("doc_id")[at].as_py(), table.column("chunk")[at].as_py()
        with gate(f"{self.name}, row {row} (document {doc_id!r}, chunk {chunk})"):
            return Record(doc_id, chunk, *self.row(table, at))

    def row(self, table: pa.Table, at: int) -> tuple[Int32s, TopK, Bools | None]:
        """(input_ids, distributions, targets) of one row of a table, all checked."""
        input_ids = table.column("input_ids")[at].values.to_numpy()
        tokens = table.column("tokens")[at].as_py()
        targets = targets_of(table, at, tokens)
        self.decoder.check(input_ids, tokens, targets)
        payload = table.column("payload")[at].as_buffer().to_pybytes()
        samples = None
        if self.has_samples:
            samples = table.column("samples")[at].as_buffer().to_pybytes()
        positions = len(positions_of(targets, tokens))
        ready = self.ranks(input_ids, targets)
        return input_ids, self.decoder.decode(payload, samples, positions, ready), targets

    def __iter__(self) -> Iterator[Record]:
        for group in range(self.file.num_row_groups):
            table = self.read_group(group)
            for row in range(int(self.starts[group]), int(self.starts[group + 1])):
                yield self.record(table, group, row)


def target_counts(table: pa.Table) -> Int32s:
    """int32 [rows]: learnt tokens of each row; without masks all its tokens."""
    if "targets" not in table.column_names:
        return np.asarray(table.column("tokens").to_numpy())
    masks = table.column("targets").to_pylist()
    return np.array([int.from_bytes(mask, "little").bit_count() for mask in masks], np.int32)


def targets_of(table: pa.Table, at: int, tokens: int) -> Bools | None:
    """The mask of one row of a table, of `tokens` tokens; None in a dump without masks."""
    if "targets" not in table.column_names:
        return None
    return unpack_mask(table.column("targets")[at].as_buffer().to_pybytes(), tokens)


class RowDecoder:
    """Decodes the rows of a shard, wherever they were read; `samples=False` leaves out samples."""

    def __init__(self, shard: Shard, plan: Json, samples: bool = True) -> None:
        self.vocab_size = int(plan["vocab_size"])
        self.k, self.entries = entries_of_a_position(shard, plan), int(shard.marker["entries"])
        self.draws = int(plan.get("samples", 0))
        self.has_samples = samples and self.draws > 0
        self.masked = shard.masked

    def check(self, input_ids: Int32s, tokens: int, targets: Bools | None) -> None:
        """Raise CorruptShard unless these can be those of a row of `tokens` tokens."""
        if (targets is not None) != self.masked:
            raise CorruptShard(
                "the row has no mask, but the plan has targets"
                if self.masked
                else "the row has a mask, but the plan has no targets"
            )
        if tokens != len(input_ids) or not tokens:
            raise CorruptShard(f"{tokens} tokens, {len(input_ids)} input ids; expected as many")
        if int(input_ids.view(np.uint32).max()) >= self.vocab_size:  # negative ids are the largest
            raise CorruptShard(
                f"expected input ids from 0 to {self.vocab_size - 1}, found {input_ids.min()} to "
                f"{input_ids.max()}"
            )

    def decode(self, payload: bytes, samples: bytes | None, positions: int, tables: Known) -> TopK:
        """The distributions of a row of that many positions; its tables are those of `ranks`."""
        limits = Limits(positions, self.k, self.vocab_size, self.entries)
        topk: TopK = decode(payload, tables, limits)
        if samples is None:
            return topk
        found = sampled.unpack(samples, Limits(positions, self.draws, self.vocab_size))
        check_samples_belong(topk, found)
        return replace(topk, samples=found)


def entries_of_a_position(shard: Shard, plan: Json) -> int:
    """The most entries that a position of this shard may hold.

    It is the plan's k. A marker that counts more than k per position is from before writers kept to
    it, and then the vocabulary alone limits a position.
    """
    any_number = min(int(plan["vocab_size"]), MOST_K)
    k = int(plan.get("k", any_number))
    return k if shard.marker["entries"] <= k * shard.marker["positions"] else any_number


@contextlib.contextmanager
def gate(where: str) -> Iterator[None]:
    """Whatever foreign bytes raise becomes CorruptShard that says where."""
    try:
        yield
    except (StoreError, Unindexable):
        raise
    except FormatVersionError as error:
        raise FormatVersionError(f"{where}: {error}") from None
    except StorageError as error:
        text = str(error)
        text = text if text.startswith(f"{where}: ") else f"{where}: {text}"
        raise CorruptShard(text) from None
    except Exception as error:  # every library raises types of its own
        raise CorruptShard(f"{where}: cannot be read ({type(error).__name__}: {error})") from error


def check_metadata(metadata: dict[bytes, bytes], shard: Shard, dump: Dump) -> str:
    """The codec of a file. Raises CorruptShard unless it was written for this shard and plan."""
    found = metadata.get(b"format", b"")
    if found not in FORMATS and found.startswith(b"mol-topk/"):
        raise FormatVersionError(
            f"format {found!r}, this release reads {', '.join(map(bytes.decode, FORMATS))}; update "
            "mol-distill"
        )
    if found not in FORMATS:
        raise CorruptShard(f"format {found!r}: this Parquet file is not a shard")
    if metadata.get(b"shard") != shard.name.encode():
        raise CorruptShard(f"holds shard {metadata.get(b'shard')!r}: data files were swapped")
    if metadata.get(b"plan_sha256") != dump.plan_sha256.encode():
        raise CorruptShard("belongs to a dump made from another plan")
    codec, planned = FORMATS[found], dump.plan.get("codec", "v1")
    if codec != planned:
        raise CorruptShard(f"its codec is {codec}, the plan says {planned}")
    if shard.tables is not None and metadata.get(b"tables") != shard.tables.encode():
        raise CorruptShard(
            f"its tables are {metadata.get(b'tables')!r}, the marker says {shard.tables}"
        )
    return codec


def check_footer(file: pq.ParquetFile, shard: Shard, expected: pa.Schema) -> None:
    """Raise CorruptShard unless the columns are a shard's, and no larger than rows allow."""
    found, metadata = file.schema_arrow, file.metadata
    for field in expected:
        types = [found.field(at).type for at in found.get_all_field_indices(field.name)]
        if len(types) != 1 or not same_type(types[0], field.type):
            raise CorruptShard(
                f"expected one column {field.name} of type {field.type}, found "
                f"{', '.join(map(str, types)) or 'none'}"
            )
    if metadata.num_rows != shard.rows:
        raise CorruptShard(
            f"{metadata.num_rows} rows, the marker says {shard.rows}: this is not the committed "
            "file"
        )
    rows = 0
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        if part.num_rows < 0:
            raise CorruptShard(f"row group {group} claims {part.num_rows} rows")
        rows += part.num_rows
        for at in range(part.num_columns):
            column = part.column(at)
            if column.path_in_schema.split(".")[0] in expected.names:
                check_column(column, part.num_rows, shard)
    if rows != shard.rows:
        raise CorruptShard(f"row groups of {rows} rows, the marker says {shard.rows}")


def check_column(column: pq.ColumnChunkMetaData, rows: int, shard: Shard) -> None:
    """Raise CorruptShard if a column of a row group would be larger than its file allows."""
    name, size = column.path_in_schema, column.total_uncompressed_size
    if not set(column.encodings) <= ENCODINGS or column.has_dictionary_page:
        raise CorruptShard(
            f"the column {name} has encodings {', '.join(column.encodings)}, expected "
            f"{', '.join(sorted(ENCODINGS))}"
        )
    if not 0 <= column.total_compressed_size <= shard.marker["bytes"]:
        raise CorruptShard(f"the column {name} claims {column.total_compressed_size} bytes")
    if not 0 <= size <= MOST_RATIO * column.total_compressed_size + FREE_BYTES:
        raise CorruptShard(
            f"the column {name} of {column.total_compressed_size} bytes claims {size} when "
            f"decompressed, expected at most {MOST_RATIO} times as many"
        )
    most = shard.tokens if name.startswith("input_ids.") else rows
    if not 0 <= column.num_values <= most or 4 * (column.num_values - rows) > size:
        raise CorruptShard(f"the column {name} claims {column.num_values} values, at most {most}")


def same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether two columns hold the same; the name of a list's element may differ."""
    if pa.types.is_list(expected):
        return pa.types.is_list(found) and bool(found.value_type == expected.value_type)
    return bool(found == expected)
