"""Export a dump to plain Parquet columns, for DuckDB, Polars and pandas."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.data_file import MISSING
from storage.dataset import LogitDataset
from storage.errors import CorruptShard
from storage.manifest import Shard
from storage.parallel import in_order
from storage.plan import masked
from storage.scan import file_bytes
from storage.shard_reader import ShardReader
from storage.store import Store
from storage.topk import Int32s, Record, UInt16s

PER_POSITION = pa.schema(
    [
        ("doc_id", pa.string()),
        ("chunk", pa.int32()),
        ("position", pa.int32()),
        ("token", pa.int32()),
        ("next_token", pa.int32()),
        ("ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("tail_logprob", pa.float32()),
    ]
)
PER_SEQUENCE = pa.schema(
    [
        ("doc_id", pa.string()),
        ("chunk", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("counts", pa.list_(pa.uint16())),
        ("ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("tail_logprob", pa.list_(pa.float32())),
    ]
)

MASK = pa.field("targets", pa.list_(pa.bool_()))
SAMPLED_PER_POSITION = [
    ("sampled_ids", pa.list_(pa.int32())),
    ("sampled_times", pa.list_(pa.uint16())),
]
SAMPLED_PER_SEQUENCE = [("sampled_counts", pa.list_(pa.uint16())), *SAMPLED_PER_POSITION]


def export(
    dataset: LogitDataset, target: str | os.PathLike[str], per: str = "position", jobs: int = 1
) -> int:
    """Write all rows to Parquet, 64 sequences at a time. Returns the rows written.

    per="position" writes one row per distribution, per="sequence" one per stored row, with a column
    `targets` if the dump says which tokens are learnt. For a dump with samples, more columns hold
    the ids drawn from the tail and how often each was drawn.

    The target is one file or, if it ends with "/" or is a folder, a folder of one file for each
    shard, in the order of their names, which `jobs` processes write. A local file, or folder,
    appears when it is whole. Raises OSError, also for a target inside the dump and for a folder
    that is not empty.
    """
    to_table, schema, sampled = {
        "position": (by_position, PER_POSITION, SAMPLED_PER_POSITION),
        "sequence": (by_sequence, PER_SEQUENCE, SAMPLED_PER_SEQUENCE),
    }[per]
    if per == "sequence" and masked(dataset.plan):
        schema = schema.insert(schema.get_field_index("counts"), MASK)
    if dataset.draws:
        schema = pa.schema([*schema, *sampled])
    store = dataset.dump.store
    if store.local and Path(os.path.realpath(target)).is_relative_to(os.path.realpath(store.root)):
        raise OSError(f"{target} is inside the dump: choose a target outside {store.path}")
    if not is_folder(target):
        with appearing(target) as own:
            return write_rows(dataset, own, to_table, schema)
    if not is_empty(target):
        raise OSError(f"{target} is not empty: choose a new folder for the files of the export")
    with appearing(target) as own:
        if "://" not in os.fspath(own):
            Path(own).mkdir(parents=True)
        work = ShardExport(dataset, os.fspath(own).rstrip("/"), to_table, schema)
        with contextlib.closing(in_order(work, dataset.shards, jobs)) as written:
            return sum(written)


def is_folder(target: str | os.PathLike[str]) -> bool:
    """Whether an export to this target writes several files."""
    return os.fspath(target).endswith("/") or Path(target).is_dir()


def is_empty(target: str | os.PathLike[str]) -> bool:
    """Whether there is no file in a folder, or no folder. Raises StoreError."""
    if "://" in os.fspath(target):
        return not Store(target).names()
    return not Path(target).is_dir() or not os.listdir(target)


@dataclass(frozen=True)
class ShardExport:
    """Writes a shard to a file of its own in `folder`; returns the rows written."""

    dataset: LogitDataset
    folder: str
    to_table: Callable[[Record, pa.Schema], pa.Table]
    schema: pa.Schema

    def __call__(self, shard: Shard) -> int:
        dump, file = self.dataset.dump, shard.name.replace("/", "-")
        try:
            with file_bytes(dump, shard) as data:
                reader = ShardReader(dump, shard, self.dataset.samples, data)
                target = f"{self.folder}/{file}.parquet"
                return write_rows(reader, target, self.to_table, self.schema)
        except FileNotFoundError:
            raise CorruptShard(f"{shard.file}: {MISSING}") from None


def write_rows(
    records: Iterable[Record],
    target: str | os.PathLike[str],
    to_table: Callable[[Record, pa.Schema], pa.Table],
    schema: pa.Schema,
) -> int:
    """Write a Parquet file. Returns its rows."""
    written = 0
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for tables in batched((to_table(record, schema) for record in records), 64):
            table = pa.concat_tables(tables)
            writer.write_table(table)
            written += len(table)
    return written


@contextlib.contextmanager
def appearing(target: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """A name to write to, which becomes the target if all goes well, and else disappears."""
    if "://" in os.fspath(target):  # pyarrow writes to an object store, which shows whole files
        yield target
        return
    target = Path(target)
    own = target.with_name(f".{target.name}.writing-{uuid.uuid4().hex}")
    try:
        yield own
        os.replace(own, target)  # also an empty folder
    finally:
        if own.is_dir():
            shutil.rmtree(own)
        own.unlink(missing_ok=True)


def batched(tables: Iterator[pa.Table], size: int) -> Iterator[list[pa.Table]]:
    batch: list[pa.Table] = []
    for table in tables:
        batch.append(table)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def by_position(record: Record, schema: pa.Schema) -> pa.Table:
    positions, samples = record.positions, record.topk.samples
    offsets = offsets_of(record.topk.counts)
    columns = [
        pa.array([record.doc_id] * len(positions), pa.string()),
        pa.array(np.full(len(positions), record.chunk, np.int32)),
        pa.array(positions.astype(np.int32)),
        pa.array(record.input_ids[positions]),
        pa.array(record.input_ids[positions + 1]),
        pa.ListArray.from_arrays(offsets, pa.array(record.topk.ids)),
        pa.ListArray.from_arrays(offsets, pa.array(record.topk.logprobs)),
        pa.array(record.topk.tail_logprob),
    ]
    if samples is not None:
        offsets = offsets_of(samples.counts)
        columns += [
            pa.ListArray.from_arrays(offsets, pa.array(values))
            for values in (samples.ids, samples.times)
        ]
    return pa.table(columns, schema=schema)


def offsets_of(counts: UInt16s) -> Int32s:
    """int32 [P + 1]: where each position's entries start, then where the last ones end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)


def by_sequence(record: Record, schema: pa.Schema) -> pa.Table:
    topk, samples = record.topk, record.topk.samples
    masks = [] if record.targets is None else [record.targets]
    values: list[Any] = [record.input_ids, *masks]
    values += [topk.counts, topk.ids, topk.logprobs, topk.tail_logprob]
    if samples is not None:
        values += [samples.counts, samples.ids, samples.times]
    columns = [pa.array([record.doc_id]), pa.array([record.chunk], pa.int32())]
    columns += [
        pa.array([value], field.type) for value, field in zip(values, list(schema)[2:], strict=True)
    ]
    return pa.table(columns, schema=schema)
