"""export: plain Parquet columns that DuckDB, Polars and pandas read without this project."""

import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.dataset import LogitDataset
from storage.topk import Record

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


def export(dataset: LogitDataset, target: str | os.PathLike[str], per: str = "position") -> int:
    """Write all rows to one Parquet file, a sequence at a time; returns the rows written.

    per="position": one row per distribution. per="sequence": one row per stored row.
    """
    to_table, schema = {
        "position": (by_position, PER_POSITION),
        "sequence": (by_sequence, PER_SEQUENCE),
    }[per]
    written = 0
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for tables in batched((to_table(record) for record in dataset), 64):
            table = pa.concat_tables(tables)
            writer.write_table(table)
            written += len(table)
    return written


def batched(tables: Iterator[pa.Table], size: int) -> Iterator[list[pa.Table]]:
    batch: list[pa.Table] = []
    for table in tables:
        batch.append(table)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def by_position(record: Record) -> pa.Table:
    positions = len(record.topk)
    offsets = np.concatenate([[0], np.cumsum(record.topk.counts, dtype=np.int64)]).astype(np.int32)
    columns = [
        pa.array([record.doc_id] * positions, pa.string()),
        pa.array(np.full(positions, record.chunk, np.int32)),
        pa.array(np.arange(positions, dtype=np.int32)),
        pa.array(record.input_ids[:-1]),
        pa.array(record.input_ids[1:]),
        pa.ListArray.from_arrays(offsets, pa.array(record.topk.ids)),
        pa.ListArray.from_arrays(offsets, pa.array(record.topk.logprobs)),
        pa.array(record.topk.tail_logprob),
    ]
    return pa.table(columns, schema=PER_POSITION)


def by_sequence(record: Record) -> pa.Table:
    topk = record.topk
    values = [record.input_ids, topk.counts, topk.ids, topk.logprobs, topk.tail_logprob]
    columns = [pa.array([record.doc_id]), pa.array([record.chunk], pa.int32())]
    columns += [
        pa.array([value], field.type)
        for value, field in zip(values, list(PER_SEQUENCE)[2:], strict=True)
    ]
    return pa.table(columns, schema=PER_SEQUENCE)
