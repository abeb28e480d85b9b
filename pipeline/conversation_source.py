"""Files whose documents are conversations, or prompts with their completions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.corpus_readers import Source, as_python, check_sizes, without_nulls

TOOLS = "tools"  # the column of the tools that a conversation may use, if there is one


@dataclass(frozen=True)
class ConversationSource(Source):
    """One file. The columns of a document are kept as one JSON object."""

    columns: tuple[str, ...] = field(kw_only=True)
    """That of messages, or those of prompts and completions. A document without one is none."""

    @property
    def option(self) -> str:
        return "messages_column" if len(self.columns) == 1 else "prompt_column, completion_column"

    @property
    def names(self) -> tuple[str, ...]:
        return self.columns

    @property
    def optional(self) -> tuple[str, ...]:
        return (TOOLS,)

    @property
    def key(self) -> list[Any]:
        return ["conversation", *self.columns]

    def from_json(self, value: dict[str, Any], place: str) -> str | None:
        return self.document({name: value.get(name) for name in (*self.columns, TOOLS)}, place)

    def from_arrow(self, batch: pa.RecordBatch, row: int) -> Iterator[str | None]:
        names = [name for name in (*self.columns, TOOLS) if name in batch.schema.names]
        for name in names:
            check_sizes(self, batch[name], row)
        for number, values in enumerate(zip(*map(batch.column, names), strict=True), row):
            place = f"row {number}"
            found = [without_nulls(as_python(self, value, place)) for value in values]
            yield self.document(dict(zip(names, found, strict=True)), place)

    def document(self, values: dict[str, Any], place: str) -> str | None:
        """The columns that are not null; None where one is that it needs."""
        if any(values[name] is None for name in self.columns):
            return None
        kept = {name: value for name, value in values.items() if value is not None}
        return self.chat_as_json(kept, place)


def parts_of(document: str) -> dict[str, Any]:
    """The columns of what a ConversationSource keeps."""
    found: dict[str, Any] = json.loads(document)
    return found
