"""Compressed top-k next-token distributions on disk. FORMAT.md is the specification.

Needs numpy, pyarrow, zstandard and fsspec; version 2 also needs numba. Does not need torch.
"""

from storage.codec.codec import decode, encode
from storage.codec.frames import Limits
from storage.codec.v1 import Ranks
from storage.codec.v2_tables import Row, Successors
from storage.dataset import LogitDataset
from storage.errors import (
    CorruptIndex,
    CorruptPayload,
    CorruptShard,
    FormatVersionError,
    IncompleteDump,
    InvalidRecord,
    PlanMismatch,
    StorageError,
    StoreError,
)
from storage.manifest import Dump, Manifest, Partition, create_dump
from storage.samples import Samples
from storage.shard_writer import ShardWriter
from storage.topk import Record, TopK
from storage.verify import verify

__all__ = [
    "CorruptIndex",
    "CorruptPayload",
    "CorruptShard",
    "Dump",
    "FormatVersionError",
    "IncompleteDump",
    "InvalidRecord",
    "Limits",
    "LogitDataset",
    "Manifest",
    "Partition",
    "PlanMismatch",
    "Ranks",
    "Record",
    "Row",
    "Samples",
    "ShardWriter",
    "StorageError",
    "StoreError",
    "Successors",
    "TopK",
    "create_dump",
    "decode",
    "encode",
    "verify",
]
