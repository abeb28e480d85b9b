"""ShardReader: the rows of one committed data file."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.codec import samples as sampled
from storage.codec.codec import decode
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import Row, Successors
from storage.data_file import open_source
from storage.errors import CorruptPayload, CorruptShard, StorageError
from storage.manifest import Shard
from storage.shard import FORMATS, SCHEMA, footer_crc32, unpack_ranks
from storage.store import Store
from storage.topk import Int32s, Record, TopK, check_samples_belong


class ShardReader:
    """The rows of one committed data file; `samples=False` does not read their samples.

    Raises CorruptShard that names the file, and the row where one row is damaged, and StoreError.
    """

    def __init__(self, store: Store, shard: Shard, samples: bool = True) -> None:
        self.shard, self.name = shard, shard.file
        try:
            source = open_source(store, shard)
            expected = shard.marker.get("footer_crc32")
            if expected is not None and footer_crc32(source) != expected:
                raise CorruptShard("the CRC-32 of the footer is not the marker's")
            self.file = pq.ParquetFile(source, page_checksum_verification=True)
            metadata = self.file.metadata.metadata or {}
            if metadata.get(b"format") not in FORMATS:
                raise CorruptShard(
                    f"format {metadata.get(b'format')!r}, this release reads "
                    f"{', '.join(name.decode() for name in FORMATS)}"
                )
            self.codec = FORMATS[metadata[b"format"]]
            self._tables: Ranks | Successors | None = None
            if self.codec == "v1":
                self._tables = unpack_ranks(metadata[b"ranks"])
            self.has_samples = samples and "samples" in self.file.schema_arrow.names
        except FileNotFoundError:
            raise CorruptShard(
                f"{self.name}: the data file is missing, but its marker exists; restore the file, "
                "or remove the marker and run the dump again"
            ) from None
        except (pa.ArrowException, OSError, KeyError, ValueError, StorageError) as error:
            raise CorruptShard(f"{self.name}: cannot be read as a shard ({error})") from None
        groups = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.cumsum([0, *groups])
        if self.starts[-1] != shard.rows:
            raise CorruptShard(
                f"{self.name}: {self.starts[-1]} rows, the marker says {shard.rows}: this is not "
                "the committed file"
            )

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """int32 [rows]: tokens of each row. Reads no payloads."""
        return np.asarray(self.read(columns=["tokens"]).column(0).to_numpy(), np.int32)

    def read(self, columns: list[str]) -> pa.Table:
        """These columns of all rows."""
        try:
            return self.file.read(columns=columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptShard(f"{self.name}: {error}") from None

    def group_of(self, row: int) -> int:
        """The row group that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def read_group(self, group: int) -> pa.Table:
        """The rows of a row group, still encoded."""
        try:
            names = [*SCHEMA.names, "samples"] if self.has_samples else SCHEMA.names
            return self.file.read_row_group(group, columns=names)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptShard(f"{self.name}, row group {group}: {error}") from None

    def ranks(self, input_ids: Int32s) -> Ranks | Row:
        """The tables that decode the payload of the row with these input_ids."""
        if self._tables is None:
            try:
                first = self.file.read_row_group(0, columns=["successors"]).column(0)[0]
                self._tables = Successors.unpack(first.as_py() or b"")
            except (pa.ArrowException, OSError, ValueError, IndexError, CorruptPayload) as error:
                raise CorruptShard(f"{self.name}: {error}") from None
        return self._tables if isinstance(self._tables, Ranks) else self._tables.row(input_ids)

    def record(self, table: pa.Table, group: int, row: int) -> Record:
        """Decode row `row` of the file from the table of its row group."""
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
        tokens = table.column("tokens")[at].as_py()
        if len(topk) != len(input_ids) - 1 or tokens != len(input_ids):
            raise CorruptShard(
                f"{where}: {tokens} tokens, {len(input_ids)} input ids, {len(topk)} distributions; "
                "n tokens need n input ids and n - 1 distributions"
            )
        return Record(doc_id, chunk, input_ids, topk)

    def __iter__(self) -> Iterator[Record]:
        for group in range(self.file.num_row_groups):
            table = self.read_group(group)
            for row in range(int(self.starts[group]), int(self.starts[group + 1])):
                yield self.record(table, group, row)
