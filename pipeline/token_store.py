"""A tokenized corpus on disk: parts, which are memory-mapped, and a store.json, written last.

A part is an Arrow file of the sequences of some consecutive documents. Reading a sequence costs the
same in any store, and takes no memory of its own: processes of one machine share the pages.
"""

import contextlib
import os
import re
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.cache_use import use
from pipeline.json_files import read_object, write_json
from pipeline.token_columns import Marked
from pipeline.types import Int32s, Int64s, Json
from storage.targets import Bools, positions_of

VERSION = 1
"""Raise it where documents become other tokens, or parts have another layout."""
STORE = "store.json"
LOCKS = ".locks"
"""The file of the locks of those who write parts."""
PART = re.compile(r"\d+-\d+\.arrow|\.\d+-\d+\.arrow\..+\.draft")
"""Names of parts and their drafts."""
SMALL_IDS = 1 << 16
"""Ids below it are stored in 2 bytes, others in 4."""
BATCH_TOKENS = 1 << 20


class Row(NamedTuple):
    """One sequence of a document."""

    document: int
    chunk: int
    """Number of the piece of the document, counted from 0."""
    input_ids: Int32s
    targets: Bools | None
    """bool [tokens]: which are learnt; None in a store where all are."""
    target_count: int

    @classmethod
    def of(
        cls, document: int, chunk: int, input_ids: Int32s, targets: Bools | None, masked: bool
    ) -> "Row":
        """The row of a sequence. `masked`: whether the store has masks; None is then all but the
        first token, which nothing predicts."""
        if not masked:
            return cls(document, chunk, input_ids, None, len(input_ids))
        positions = positions_of(targets, len(input_ids))
        marks = np.zeros(len(input_ids), bool)
        marks[positions + 1] = True
        return cls(document, chunk, input_ids, marks, len(positions))


@dataclass(frozen=True)
class PartSums:
    """What store.json says of a part."""

    name: str
    bytes: int
    sequences: int
    documents: int
    """that have a sequence"""
    tokens: int
    targets: int
    longest: int
    """Tokens of the longest sequence."""


def schema_of(vocabulary: int, masked: bool) -> pa.Schema:
    """The columns of a part: one row for each sequence. Ids are below `vocabulary`."""
    ids = pa.uint16() if vocabulary <= SMALL_IDS else pa.int32()
    found = {
        "document": pa.int64(),
        "chunk": pa.int32(),
        "target_count": pa.int32(),
        "input_ids": pa.list_(ids),
    }
    return pa.schema(found | ({"targets": pa.list_(pa.bool_())} if masked else {}))


def write_part(path: Path, rows: Iterable[Row], schema: pa.Schema) -> None:
    """Write a part: complete, or not at all. Raises OSError."""
    handle, draft = tempfile.mkstemp(".draft", f".{path.name}.", path.parent)
    try:
        with open(handle, "wb") as file:
            with pa.ipc.new_file(file, schema) as stream:
                for batch in batches(rows):
                    stream.write_batch(as_arrow(batch, schema))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def drafts_of(path: Path) -> Iterable[Path]:
    """What writers of a part have not finished, or left behind when they were killed."""
    return path.parent.glob(f".{path.name}.*.draft")


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in groups of bounded size."""
    batch: list[Row] = []
    tokens = 0
    for row in rows:
        batch.append(row)
        tokens += len(row.input_ids)
        if tokens >= BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def as_arrow(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    documents, chunks, ids, targets, counts = zip(*rows, strict=True)
    offsets = pa.array(np.cumsum([0, *map(len, ids)]), pa.int32())
    kind = schema.field("input_ids").type.value_type.to_pandas_dtype()
    flat = np.concatenate(ids)
    assert flat.max() <= np.iinfo(kind).max, "an id that is none of the tokenizer's"
    columns = {
        "document": pa.array(documents, pa.int64()),
        "chunk": pa.array(chunks, pa.int32()),
        "target_count": pa.array(counts, pa.int32()),
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(flat.astype(kind))),
    }
    if "targets" in schema.names:
        columns["targets"] = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(targets)))
    return pa.record_batch(list(columns.values()), schema=schema)


class Batch:
    """Some rows of a part, as views of its file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        ids = batch["input_ids"]
        self.offsets: npt.NDArray[np.int32] = ids.offsets.to_numpy()
        self.ids = ids.values.to_numpy()
        self.targets = batch["targets"].values if "targets" in batch.schema.names else None

    def __getitem__(self, row: int) -> Marked:
        start, stop = self.offsets[row : row + 2].tolist()
        targets = None
        if self.targets is not None:
            targets = self.targets[start:stop].to_numpy(zero_copy_only=False)
        return self.ids[start:stop].astype(np.int32), targets

    def column(self, name: str) -> Int64s:
        """`document`, `chunk`, `target_count` or `length` (tokens) of each row."""
        if name == "length":
            return np.diff(self.offsets).astype(np.int64)
        return self.batch[name].to_numpy().astype(np.int64)


class Part:
    """The rows of one file of a store."""

    def __init__(self, batches: list[pa.RecordBatch]) -> None:
        self.batches = [Batch(each) for each in batches]
        self.starts = np.cumsum([0, *(each.num_rows for each in batches)]).tolist()

    @classmethod
    def open(cls, path: Path, schema: pa.Schema | None = None) -> "Part":
        """The file, memory-mapped. Raises OSError and pa.ArrowInvalid for one that is none."""
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            if schema is not None and reader.schema != schema:
                raise pa.ArrowInvalid(f"{path}: has other columns")
            return cls([reader.get_batch(at) for at in range(reader.num_record_batches)])

    def __getitem__(self, row: int) -> Marked:
        at = bisect_right(self.starts, row) - 1
        return self.batches[at][row - self.starts[at]]

    def column(self, name: str) -> Int64s:
        found = [each.column(name) for each in self.batches]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def sums(self, name: str, size: int) -> PartSums:
        """What store.json says of a part, of which `size` is the bytes."""
        lengths, documents = self.column("length"), self.column("document")
        return PartSums(
            name=name,
            bytes=size,
            sequences=len(lengths),
            documents=len(np.unique(documents)),
            tokens=int(lengths.sum()),
            targets=int(self.column("target_count").sum()),
            longest=int(lengths.max(initial=0)),
        )


def sums_of(path: Path, schema: pa.Schema) -> PartSums | None:
    """What store.json says of a part; None for a file that is not a whole part of this schema.

    Checks that no row leads out of the file.
    """
    try:
        part = Part.open(path, schema)
        for each in part.batches:
            each.batch.validate(full=True)
        return part.sums(path.name, path.stat().st_size)
    except (OSError, pa.ArrowInvalid):
        return None


class TokenStore:
    """A finished store. Nothing but its store.json is read before a sequence is asked for."""

    def __init__(self, folder: Path, content: Json) -> None:
        self.folder, self.content = folder, content
        self.facts: Json = content["facts"]
        """What is known of the corpus, so that it need not be opened."""
        self.parts = [PartSums(**each) for each in content["parts"]]
        self.starts = np.cumsum([0, *(part.sequences for part in self.parts)]).tolist()
        self.open: dict[int, Part] = {}

    def __len__(self) -> int:
        """Number of sequences."""
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself."""
        return TokenStore, (self.folder, self.content)

    def __getitem__(self, index: int) -> Marked:
        """(int32 [tokens], bool [tokens] or None) of one sequence."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index}: there are {len(self):,}")
        number = bisect_right(self.starts, index) - 1
        return self.part(number)[index - self.starts[number]]

    def part(self, number: int) -> Part:
        found = self.open.get(number)
        if found is None:
            found = self.open[number] = Part.open(self.folder / self.parts[number].name)
        return found

    def column(self, name: str) -> Int64s:
        """`document`, `chunk`, `target_count` or `length` (tokens) of every sequence."""
        found = [self.part(number).column(name) for number in range(len(self.parts))]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def total(self, name: str) -> int:
        """Sum of `documents`, `tokens` or `targets` over the parts."""
        return sum(getattr(part, name) for part in self.parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((part.longest for part in self.parts), default=0)


def find_store(folder: Path) -> TokenStore | None:
    """The store in a folder, which this process uses from now on; None where there is none, or one
    that lacks a part or a piece of one.

    Costs one small file and one listing, whatever the store holds.
    """
    content = read_object(folder / STORE) if use(folder / STORE) else None
    if content is None:
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError), os.scandir(folder) as entries:
        found = TokenStore(folder, content)
        sizes = {entry.name: entry.stat().st_size for entry in entries}
        if all(sizes.get(part.name) == part.bytes for part in found.parts):
            return found
    return None


def finish(folder: Path, parts: list[PartSums], identity: Json, facts: Json) -> TokenStore:
    """Write store.json, which makes the parts a store."""
    content = {"identity": identity, "facts": facts, "parts": [asdict(part) for part in parts]}
    write_json(folder / STORE, content)
    use(folder / STORE)
    return TokenStore(folder, content)
