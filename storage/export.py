"""Export a dump to plain Parquet columns, for DuckDB, Polars and pandas."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.dataset import LogitDataset
from storage.plan import masked
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


def export(dataset: LogitDataset, target: str | os.PathLike[str], per: str = "position") -> int:
    """Write all rows to one Parquet file, 64 sequences at a time. Returns the rows written.

    per="position" writes one row per distribution, per="sequence" one per stored row, with a column
    `targets` if the dump says which tokens are learnt. For a dump with samples, more columns hold
    the ids drawn from the tail and how often each was drawn. A local file appears when it is whole.
    Raises OSError, also for a target inside the dump.
    """
    to_table, schema, sampled = {
        "position": (by_position, PER_POSITION, SAMPLED_PER_POSITION),
        "sequence": (by_sequence, PER_SEQUENCE, SAMPLED_PER_SEQUENCE),
    }[per]
    if per == "sequence" and masked(dataset.plan):
        schema = schema.insert(schema.get_field_index("counts"), MASK)
    if dataset.draws:
        schema = pa.schema([*schema, *sampled])
    written, store = 0, dataset.dump.store
    if store.local and Path(os.path.realpath(target)).is_relative_to(os.path.realpath(store.root)):
        raise OSError(f"{target} is inside the dump: choose a target outside {store.path}")
    with appearing(target) as own, pq.ParquetWriter(own, schema, compression="zstd") as writer:
        for tables in batched((to_table(record, schema) for record in dataset), 64):
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
        os.replace(own, target)
    finally:
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
