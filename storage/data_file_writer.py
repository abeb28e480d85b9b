"""DataFileWriter: one data file, row group after row group, and its index."""

import contextlib
import mmap
import uuid
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from storage import row_head
from storage.codec.codec import pack, tables_of_row, unpack
from storage.codec.frames import Limits
from storage.errors import CorruptPayload, CorruptShard
from storage.index import pack_index
from storage.manifest import Partition
from storage.own_tables import Chosen
from storage.parsing import MOST_K
from storage.pending_row import PendingRow
from storage.places import Group, Places, start
from storage.plan import masked
from storage.row_head import RowHead
from storage.shard import SCHEMA, schema_of
from storage.shard_reader import gate
from storage.targets import pack_mask

LEAVES = ("doc_id", "chunk", "tokens", "input_ids.list.element", "payload", "targets")
PAYLOADS = ("payload", "samples", "successors")  # already compressed
ENCODERS = 2  # threads: more of them wait for each other


class DataFileWriter:
    """An open data file, in the folder where files are staged; `local` is its path.

    Its rows are encoded with the tables in `chosen`. Raises StoreError, and CorruptShard for a row
    that does not decode.
    """

    def __init__(self, partition: Partition, name: str, chosen: Chosen) -> None:
        self.dump, self.name, self.chosen = partition.dump, name, chosen
        plan = self.dump.plan
        self.vocab_size, self.masked = int(plan["vocab_size"]), masked(plan)
        self.k = int(plan.get("k", min(self.vocab_size, MOST_K)))
        self.has_samples = plan.get("samples", 0) > 0
        self.groups: list[Group] = []
        self.rows = self.tokens = self.bytes = 0
        metadata = {
            "format": f"mol-topk/{plan.get('codec', 'v1')[1:]}".encode(),
            "shard": name.encode(),
            "plan_sha256": self.dump.plan_sha256,
            **chosen.metadata,
        }
        folder = self.dump.store.staging_folder(partition.name)
        self.local = folder / f".writing-{name.replace('/', '-')}-{uuid.uuid4().hex}"
        with self.dump.store.explaining("write", name):
            self.file = pq.ParquetWriter(
                self.local,
                schema_of(plan),
                compression={
                    name: "none" if name in PAYLOADS else "zstd" for name in (*LEAVES, *PAYLOADS)
                },
                compression_level={name: 9 for name in LEAVES if name not in PAYLOADS},
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                store_schema=False,  # the Parquet schema says it all
            )
        self.file.add_key_value_metadata(metadata)

    def write(self, rows: Sequence[PendingRow]) -> None:
        """Encode these rows and write them as one row group."""
        # The slow parts of encoding release the GIL.
        with ThreadPoolExecutor(ENCODERS, "encoding") as pool:
            payloads = list(pool.map(self.payload, rows, range(self.rows, self.rows + len(rows))))
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
        if self.has_samples:
            columns.append(pa.array([row.samples for row in rows], pa.binary()))
        if self.chosen.value is not None:
            first = None if self.rows else self.chosen.value
            columns.append(pa.array([first, *[None] * (len(rows) - 1)], pa.binary()))
        with self.dump.store.explaining("write", self.name):
            self.file.write_table(pa.table(columns, schema=self.file.schema))
        tokens = [len(row.input_ids) for row in rows]
        samples = [start(row.samples) for row in rows] if self.has_samples else []
        targets = [len(row.grid.counts) for row in rows] if self.masked else []
        self.groups.append(Group(tokens, list(map(start, payloads)), samples, targets=targets))
        self.rows += len(rows)
        self.tokens += sum(tokens)
        self.bytes = self.local.stat().st_size

    def payload(self, row: PendingRow, number: int) -> bytes:
        """Row `number`, encoded, with its head. Raises CorruptShard if it does not decode so."""
        assert self.chosen.tables is not None
        ranks = tables_of_row(self.chosen.tables, row.input_ids, row.targets)
        plan, crc = self.dump.plan_sha256, zlib.crc32(row.samples)
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

    def close(self) -> None:
        with self.dump.store.explaining("write", self.name):
            self.file.close()

    def index(self, sha256: str) -> bytes:
        """The index of the closed file, which has this sha256."""
        successors = start(self.chosen.value) if self.chosen.value else b""
        with (
            gate(self.name),
            self.local.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            places = Places(data, pq.read_metadata(self.local))
            part = places.part(self.groups, successors, self.has_samples)
        return pack_index([part], sha256, self.dump.plan_sha256)

    def abort(self) -> None:
        """Remove the file, as far as the disk allows: a full one must not hide the first error."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.local.unlink(missing_ok=True)
