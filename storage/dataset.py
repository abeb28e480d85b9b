"""LogitDataset: random access to the rows of a dump."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from storage.errors import Unindexable
from storage.index import Index
from storage.index_files import made_once, open_index
from storage.manifest import Dump, Manifest, Shard
from storage.parsing import MOST_K, Json
from storage.plan import masked
from storage.row_reader import RowReader
from storage.scan import index_dump
from storage.shard_reader import ShardReader
from storage.topk import Int32s, Record

OPEN_SHARDS = 32
CACHED_GROUPS = 8


class LogitDataset:
    """The rows of a finished dump, in order: `dataset[i]` returns a Record.

    A dataset can be pickled and used in forked workers: each process opens its own files.
    `partial=True` reads an unfinished dump: the rows committed by now; later ones do not appear.
    `samples=False` does not read the samples of the tails.

    Opening reads plan, manifest and the head of the index, however many shards there are. A row is
    one range of its shard's file (two with samples). A dump without an index is read row group by
    row group until `lengths` are asked for, see there.

    Raises IncompleteDump if the dump is missing or unfinished, CorruptShard with file and row,
    CorruptIndex, FormatVersionError for the data of a later release, IndexError, and StoreError.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, partial: bool = False, samples: bool = True
    ) -> None:
        self.dump = Dump(path)
        self.partial, self.samples = partial, samples
        self._shards: tuple[Shard, ...] | None = None
        self._manifest: Manifest | None = None
        self._data = b"" if partial else self.dump.manifest_bytes()  # parsed when it is needed
        self._fingerprint = hashlib.sha256(self._data).hexdigest()
        self._index = self._opened()
        if self._index is None:
            self.starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        else:
            self.starts = self._index.starts
        self._forget()

    def _opened(self) -> Index | None:
        """The index, if the dump is finished and has one."""
        if self.partial:
            return None
        index = open_index(self.dump.store, self._fingerprint, self.dump.plan_sha256)
        if index is not None and index.rows and index.masked != masked(self.plan):
            raise index.damaged("it and the plan disagree whether rows have masks of targets")
        return index

    def _forget(self) -> None:
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._rows: RowReader | None = None
        self._counted: dict[bool, Int32s] = {}  # without an index: lengths, targets
        self._process = os.getpid()

    @property
    def manifest(self) -> Manifest:
        if self.partial:
            return self.dump.manifest()
        if self._manifest is None:
            self._manifest, self._data = self.dump.parsed(self._data), b""
        return self._manifest

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The committed shards, in order."""
        if self._shards is None:
            self._shards = tuple(self.dump.shards()) if self.partial else self.manifest.shards
        return self._shards

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
        return self.dump.manifest().fingerprint if self.partial else self._fingerprint

    @property
    def lengths(self) -> Int32s:
        """int32 [rows]: tokens of each row, from the index; read-only.

        A finished local dump of a release that wrote no index gets one here, in the cache of this
        machine, from one reading of its shards.
        """
        return self._counts(masks=False)

    @property
    def target_counts(self) -> Int32s:
        """int32 [rows]: learnt tokens of each row, as `lengths`; all its tokens without masks."""
        return self._counts(masks=masked(self.plan))

    def _counts(self, masks: bool) -> Int32s:
        """`lengths`, or the targets of rows with masks."""
        if self._index is None and not self.partial and self.dump.store.local:
            self._index = self._made_index()
        if self._index is not None:
            return self._index.target_counts if masks else self._index.lengths
        if masks not in self._counted:
            readers = map(self._reader, range(len(self.shards)))
            parts = [one.target_counts() if masks else one.lengths() for one in readers]
            self._counted[masks] = np.concatenate([np.zeros(0, np.int32), *parts])
        return self._counted[masks]

    def _made_index(self) -> Index | None:
        """A new index of the dump; None if its shards cannot have one."""
        try:
            return made_once(
                self._fingerprint,
                self.dump.plan_sha256,
                lambda: index_dump(self.dump, self.manifest),
            )
        except Unindexable:
            return None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        number, row = self._place(index)
        if self._index is not None:
            return self._row_reader(self._index).record(number, row)
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
        """The records of these rows, in the given order; a row asked for twice is read once.

        Rows of a remote dump are requested at the same time. Without an index, each row group is
        read once.
        """
        wanted = list(indices)
        order = sorted(set(wanted), key=lambda index: index % max(len(self), 1))
        if self._index is not None:
            places = [self._place(index) for index in order]
            records = self._row_reader(self._index).records(places)
        else:
            records = [self[index] for index in order]
        found = dict(zip(order, records, strict=True))
        return [found[index] for index in wanted]

    def _place(self, index: int) -> tuple[int, int]:
        """(number of the shard, row in it). Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index}: the dump has {len(self)} rows, numbered from 0")
        index %= len(self)
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])

    def _row_reader(self, index: Index) -> RowReader:
        if self._rows is None:
            self._rows = RowReader(self.dump, index, self.shards, self.samples)
        return self._rows

    def __iter__(self) -> Iterator[Record]:
        for number in range(len(self.shards)):  # row group after row group
            yield from self._reader(number)

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
        own = {"_index", "_readers", "_groups", "_rows", "_counted"}
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index = self._opened()
        self._forget()
