"""Files whose documents are token ids, and the column of their masks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa

from pipeline.corpus_files import format_of
from pipeline.corpus_readers import (
    LINE_BYTES,
    Document,
    Source,
    check_sizes,
    json_rows,
    missing,
    schema_of,
)
from pipeline.token_columns import Marked, TokenColumns, Wrong, is_list

OPTION = "tokens_column or corpus.mask_column"
MASK, LABELS = "loss_mask", "labels"  # read where no column is named


@dataclass(frozen=True)
class TokenSource(Source):
    """One file of documents that are tokens."""

    columns: TokenColumns = field(kw_only=True)
    guessed: bool = False
    """Whether the column of the mask was found, not named. Then no document may have another."""

    @property
    def option(self) -> str:
        return OPTION

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.columns.names)

    @property
    def key(self) -> list[Any]:
        columns = self.columns
        return ["tokens", columns.tokens, columns.mask, self.guessed, columns.vocabulary]

    @property
    def fields(self) -> dict[str, pa.DataType]:
        kinds = (pa.list_(pa.int32()), pa.list_(pa.bool_()))
        return dict(zip(self.names, kinds, strict=False))

    def arrays(self, contents: list[Marked]) -> list[pa.Array]:
        kinds = self.fields.values()
        return [pa.array([each[at] for each in contents], kind) for at, kind in enumerate(kinds)]

    def size(self, content: Marked) -> int:
        return content[0].nbytes

    value_bytes: ClassVar[int] = 8

    @property
    def limit(self) -> int:
        return LINE_BYTES

    def documents(self) -> Iterator[Document]:
        if self.guessed and format_of(self.name) in ("parquet", "arrow"):
            self.check_mask(mask_of_schema(schema_of(self)), self.wrong)
        yield from super().documents()

    def from_json(self, value: dict[str, Any], place: str) -> Marked:
        wrong = partial(self.wrong, place=place)
        self.check_mask(mask_among(value, lists_of(value)), wrong)
        for name in self.names:
            if name not in value:
                raise missing(self, set(value), name, place)
        return self.columns.of_json(value, wrong)

    def from_arrow(self, batch: pa.RecordBatch, row: int) -> Iterator[Marked]:
        columns = [batch[name] for name in self.names]
        for column in columns:
            check_sizes(self, column, row)
        for number, values in enumerate(zip(*columns, strict=True), row):
            yield self.columns.of_arrow(values, partial(self.wrong, place=f"row {number}"))

    def check_mask(self, found: str | None, wrong: Wrong) -> None:
        """Refuse a document, or a file, with another mask than the first one's."""
        expected = self.columns.mask
        if self.guessed and found != expected:
            raise wrong(
                f"has {found or 'no mask'}, and the first document {expected or 'no mask'}: which "
                "tokens are learnt? Set corpus.mask_column, or corpus.targets: all"
            )


def guess_mask(sources: list[Source]) -> str | None:
    """The mask's column, by the first document, or by the columns of the first file."""
    kind = format_of(sources[0].name)
    if kind == "json":
        rows = (row for source in sources for _, _, row in json_rows(source))
        row = next(rows, {})
        return mask_among(row, lists_of(row))
    return None if kind == "text" else mask_of_schema(schema_of(sources[0]))


def mask_of_schema(schema: pa.Schema) -> str | None:
    return mask_among(schema.names, [each.name for each in schema if is_list(each.type)])


def mask_among(names: Any, lists: list[str]) -> str | None:
    """The column to read as a mask. `labels` that are no lists are those of classes."""
    return MASK if MASK in names else LABELS if LABELS in lists else None


def lists_of(row: dict[str, Any]) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, list)]
