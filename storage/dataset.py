"""LogitDataset: random access to the rows of a dump."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from storage.manifest import Dump, Manifest
from storage.parsing import MOST_K, Json
from storage.shard_reader import ShardReader
from storage.topk import Int32s, Record

OPEN_SHARDS = 32
CACHED_GROUPS = 8


class LogitDataset:
    """The rows of a finished dump, in order: `dataset[i]` returns a Record.

    A dataset can be pickled and used in forked workers: each process opens its own files.
    `partial=True` reads an unfinished dump: the rows committed by now; later ones do not appear.
    `samples=False` does not read the samples of the tails.

    Raises IncompleteDump if the dump is missing or unfinished, CorruptShard with file and row,
    FormatVersionError for the data of a later release, IndexError, and StoreError.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, partial: bool = False, samples: bool = True
    ) -> None:
        self.dump = Dump(path)
        self.partial, self.samples = partial, samples
        manifest = None if partial else self.dump.manifest()
        self._manifest = manifest
        self.shards = tuple(self.dump.shards()) if manifest is None else manifest.shards
        self.starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._forget()

    def _forget(self) -> None:
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lengths: Int32s | None = None
        self._process = os.getpid()

    @property
    def manifest(self) -> Manifest:
        return self._manifest or self.dump.manifest()

    @property
    def plan(self) -> Json:
        return self.dump.plan

    @property
    def k(self) -> int:
        """Most entries of a position; 0 in a dump of samples alone."""
        return int(self.plan.get("k", min(int(self.plan["vocab_size"]), MOST_K)))

    @property
    def draws(self) -> int:
        """Ids drawn from each tail in the records of this dataset; 0 without samples."""
        return int(self.plan.get("samples", 0)) if self.samples else 0

    @property
    def fingerprint(self) -> str:
        """The sha256 of manifest.json, which changes with any row. Raises IncompleteDump."""
        return self.manifest.fingerprint

    @property
    def lengths(self) -> Int32s:
        """int32 [rows]: tokens of each row. Reads no payloads."""
        if self._lengths is None:
            parts = [self._reader(number).lengths() for number in range(len(self.shards))]
            self._lengths = np.concatenate([np.zeros(0, np.int32), *parts])
        return self._lengths

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index}: the dump has {len(self)} rows, numbered from 0")
        index %= len(self)
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = index - int(self.starts[number])
        reader = self._reader(number)
        group = reader.group_of(row)
        table = self._groups.pop((number, group), None)
        if table is None:
            table = reader.read_group(group)
        self._groups[number, group] = table  # most recent last
        if len(self._groups) > CACHED_GROUPS:
            self._groups.popitem(last=False)
        return reader.record(table, group, row)

    def read(self, indices: Iterable[int]) -> list[Record]:
        """The records of these rows, in the given order. Reads each row group once.

        Use it for batches of rows from all over a dump, such as those of a shuffled DataLoader.
        """
        wanted = list(indices)
        found: dict[int, Record] = {}
        for index in sorted(set(wanted), key=lambda index: index % max(len(self), 1)):
            found[index] = self[index]
        return [found[index] for index in wanted]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def _reader(self, number: int) -> ShardReader:
        if self._process != os.getpid():  # forked: file positions must not be shared
            self._forget()
        reader = self._readers.pop(number, None)
        if reader is None:
            reader = ShardReader(self.dump, self.shards[number], self.samples)
        self._readers[number] = reader
        if len(self._readers) > OPEN_SHARDS:
            self._readers.popitem(last=False)
        return reader

    def __getstate__(self) -> dict[str, Any]:
        own = {"_readers", "_groups", "_lengths"}
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
