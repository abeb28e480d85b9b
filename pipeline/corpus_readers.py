"""Documents of one file, as the file holds them: nothing is guessed, converted or left out.

Only the columns that are asked for are looked at, so whatever else a file holds does no harm.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus_files import compression_of, format_of, without_compression
from pipeline.errors import ConfigError

MIB = 1 << 20
DOCUMENT_BYTES = 16 * MIB
"""Longest document. The tokenizer takes some 200 bytes of memory for each byte of it."""
LINE_BYTES = 64 * MIB
"""Longest line of JSON, with the columns that are not asked for."""
ARRAY_BYTES = 256 * MIB  # of a .json file that holds one array: it is parsed at once
ID_CHARACTERS = 4096
BATCH_BYTES, BATCH_ROWS = 64 * MIB, 1024  # of Parquet that are decoded at a time
BOM = b"\xef\xbb\xbf"
ARROW_FILE = b"ARROW1"  # begins an Arrow file that has a footer; a stream has none

Document = tuple[Any, str | None]
"""What is kept of a document (text, the JSON of chat messages, a token document); id. Null for
none."""


@dataclass(frozen=True)
class Source:
    """One file of a corpus, with a column of text or of chat messages.

    Other kinds of documents are other classes: they say which columns are read (`names`), what is
    kept of them (`from_json`, `from_arrow`) and as what (`fields`).
    """

    name: str
    """As messages name it."""
    path: str
    """Local file with its content."""
    column: str
    chat: bool = False
    """Whether the column holds chat messages, not text."""

    @property
    def option(self) -> str:
        """The setting that names the columns."""
        return "messages_column" if self.chat else "text_column"

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read, beside `id`."""
        return (self.column,)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are read where there are any."""
        return ()

    @property
    def key(self) -> list[Any]:
        """What decides the documents beside the bytes, as plain JSON."""
        return [self.column, self.chat]

    @property
    def fields(self) -> dict[str, pa.DataType]:
        """Columns that hold what is kept, with their types."""
        return {self.column: pa.string()}

    def arrays(self, contents: list[Any]) -> list[pa.Array]:
        """One array for each of `fields`."""
        return [pa.array(contents, pa.string())]

    def size(self, content: Any) -> int:
        """Bytes of what is kept of a document, roughly."""
        return len(content or "")

    value_bytes: ClassVar[int] = 4
    """Least bytes of a value in memory, such as the offset of a text."""

    @property
    def limit(self) -> int:
        """Most bytes of a row in a file of columns."""
        return LINE_BYTES if self.chat else DOCUMENT_BYTES

    def documents(self) -> Iterator[Document]:
        """Raises ConfigError, with the line or row, for what cannot be read."""
        read = {
            "json": read_json,
            "parquet": read_parquet,
            "arrow": read_arrow,
            "text": read_text,
        }
        return read[str(format_of(self.name))](self)

    def from_json(self, value: dict[str, Any], place: str) -> Any:
        """What is kept of a JSON object."""
        return self.content(value.get(self.column), place)

    def from_arrow(self, batch: pa.RecordBatch, row: int) -> Iterator[Any]:
        """What is kept of each row; `row` is the first one's number."""
        values = batch[self.column]
        check_sizes(self, values, row)
        for number, value in enumerate(values, row):
            content = as_python(self, value, f"row {number}")
            yield self.content(without_nulls(content) if self.chat else content, f"row {number}")

    def wrong(self, what: str, place: str = "") -> ConfigError:
        where = f"{self.name}, {place}" if place else self.name
        return ConfigError(f"corpus {where}: {what}")

    @contextmanager
    def opened(self) -> Iterator[io.BufferedReader]:
        """The unpacked bytes. ConfigError where the compressed file is damaged or cut short."""
        compression = compression_of(self.name)
        try:
            if compression is None:
                with open(self.path, "rb") as plain:
                    yield plain
            elif os.path.getsize(self.path) == 0:
                raise OSError("Truncated compressed stream")
            else:
                stream = pa.input_stream(self.path, compression=compression)
                with io.BufferedReader(stream, MIB) as unpacked:
                    yield unpacked
        except OSError as error:
            hint = f" (not a whole {compression} file; copy it again)" if compression else ""
            raise self.wrong(f"cannot be read: {error}{hint}") from None

    def content(self, value: Any, place: str) -> str | None:
        """What is kept of the column's value: text, or chat messages as JSON."""
        if value is None:
            return None
        if self.chat:
            return self.chat_as_json(value, place)
        if not isinstance(value, str):
            raise self.wrong(
                f"expected text in column {self.column!r}, found {type(value).__name__}", place
            )
        self.check(value, place)
        return value

    def chat_as_json(self, value: Any, place: str) -> str:
        try:
            text = json.dumps(value, default=self.plain)
        except RecursionError:
            raise self.wrong("chat messages that are nested too deep", place) from None
        if len(text) > DOCUMENT_BYTES:
            raise self.too_long(place)
        return text

    def check(self, text: str, place: str) -> None:
        """Refuse text that is too long, or that no UTF-8 can hold."""
        try:
            size = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError as error:
            half = text[error.start : error.end].encode("unicode_escape").decode()
            raise self.wrong(
                f"{half} at character {error.start} is half a character (a lone surrogate). "
                "Remove or replace it",
                place,
            ) from None
        if size > DOCUMENT_BYTES:
            raise self.too_long(place)

    def too_long(self, place: str, what: str = "document", limit: int = 0) -> ConfigError:
        limit = limit or DOCUMENT_BYTES
        return self.wrong(
            f"{what} of more than {limit // MIB} MiB, the most that is read. Divide it into "
            "documents",
            place,
        )

    def plain(self, value: Any) -> str:
        """A value of Parquet that JSON lacks, such as a date."""
        if isinstance(value, bytes):
            raise self.wrong(f"column {self.column!r} holds bytes; expected text")
        return str(value)

    def id(self, value: Any, place: str) -> str | None:
        """The id as text, as the file spells it."""
        if value is None:
            return None
        if isinstance(value, dict | list):
            value = json.dumps(value, ensure_ascii=False, default=str)
        text = str(value)
        if len(text) > ID_CHARACTERS:
            raise self.wrong(f"id of {len(text):,} characters; at most {ID_CHARACTERS}", place)
        self.check(text, place)
        return text


def read_text(source: Source) -> Iterator[Document]:
    """The whole file is one document."""
    with source.opened() as file:
        data = file.read(DOCUMENT_BYTES + 1)
    if len(data) > DOCUMENT_BYTES:
        raise source.too_long("")
    if source.key != ["text", False]:
        raise missing(source, {"text"})
    lines = io.BytesIO(data)
    try:
        yield data.decode(), None
    except UnicodeDecodeError:
        for number, line in enumerate(lines, 1):
            decoded(source, line, f"line {number}")


def read_json(source: Source) -> Iterator[Document]:
    """One object on each line; or, in the whole file, one array of objects."""
    found: set[str] = set()
    names: set[str] = set()
    for place, text, value in json_rows(source):
        found.update(name for name in source.names if name in value)
        names = names or set(value)
        yield source.from_json(value, place), json_id(source, value, text, place)
    for name in source.names:
        if names and name not in found:
            raise missing(source, names, name)


def json_rows(source: Source) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """What json_objects gives. ConfigError for what is no object."""
    for place, text, value in json_objects(source):
        if not isinstance(value, dict):
            raise source.wrong(f"expected a JSON object, found {type(value).__name__}", place)
        yield place, text, value


def json_id(source: Source, value: dict[str, Any], text: str | None, place: str) -> str | None:
    own = None if "id" in source.names else value.get("id")
    if isinstance(own, float) and text is not None:  # 1.50 is not 1.5
        own = json.loads(text, parse_float=str, parse_int=str)["id"]
    return source.id(json.dumps(own) if isinstance(own, bool) else own, place)


def missing(source: Source, names: set[str], column: str = "", place: str = "") -> ConfigError:
    return source.wrong(
        f"no column {column or source.column!r}; it has {', '.join(sorted(names)) or 'none'}. "
        f"Set corpus.{source.option}",
        place,
    )


def json_objects(source: Source) -> Iterator[tuple[str, str | None, Any]]:
    """(place, JSON of the object where it is at hand, object) of each one."""
    with source.opened() as file:
        start = file.peek(1).removeprefix(BOM).lstrip()
        if start.startswith(b"[") and without_compression(source.name).lower().endswith(".json"):
            data = file.read(ARRAY_BYTES + 1)
            if len(data) > ARRAY_BYTES:
                raise source.too_long("", "array", ARRAY_BYTES)
            text = decoded(source, data.removeprefix(BOM), "")
            for number, value in enumerate(parsed(source, text, "")):
                yield f"item {number}", None, value
            return
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            place = f"line {number}"
            if len(line) > LINE_BYTES:
                raise source.too_long(place, "line", LINE_BYTES)
            if number == 1:
                line = line.removeprefix(BOM)
            text = decoded(source, line, place)
            if text.strip():
                yield place, text, parsed(source, text, place)


def decoded(source: Source, data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise source.wrong(
            f"not UTF-8 (byte {data[error.start]:#x} at {error.start}). Convert the file, e.g. "
            "with iconv, or remove the line",
            place,
        ) from None


def parsed(source: Source, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise source.wrong("JSON that is nested too deep", place) from None
    except json.JSONDecodeError as error:
        raise source.wrong(
            f"not JSON: {error.msg} at character {error.pos}; expected one object", place
        ) from None
    except ValueError:  # a number of thousands of digits, which Python does not convert
        return json.loads(text, parse_int=str)


def read_parquet(source: Source) -> Iterator[Document]:
    """The rows of the columns, and of `id` where there is one."""
    try:
        schema = schema_of(source)
        columns = columns_of(source, schema)
        # As a dictionary, a text that is there a thousand times is in memory once.
        shared = [name for name, kind in source.fields.items() if kind == pa.string()]
        nested = [each.name for each in schema if pa.types.is_nested(each.type)]
        shared = [] if source.chat else [name for name in shared if name not in nested]
        row = 0
        with pq.ParquetFile(source.path, read_dictionary=shared, buffer_size=MIB) as file:
            check_footer(source, file.metadata)
            for batch in file.iter_batches(rows_at_once(source, file.metadata), columns=columns):
                yield from arrow_documents(source, batch, row)
                row += len(batch)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise source.wrong(f"cannot be read: {error}") from None


def read_arrow(source: Source) -> Iterator[Document]:
    """The rows of an Arrow file, as `datasets` saves them (a stream), or with Arrow's footer."""
    try:
        with pa.memory_map(source.path) as file:
            row = 0
            for whole in arrow_batches(source, file):
                batch = whole.select(columns_of(source, whole.schema))
                for column in batch.columns:  # offsets of a damaged file may lead out of it
                    column.validate(full=True)
                at_once = rows_of(batch.nbytes // max(len(batch), 1))
                for first in range(0, len(batch), at_once):
                    yield from arrow_documents(source, batch.slice(first, at_once), row + first)
                row += len(batch)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise source.wrong(f"cannot be read: {error}") from None


def schema_of(source: Source) -> pa.Schema:
    """The columns of a Parquet or Arrow file. ConfigError where it cannot be read."""
    try:
        if format_of(source.name) == "parquet":
            return pq.read_schema(source.path)
        with pa.memory_map(source.path) as file:
            return arrow_reader(file).schema
    except (pa.ArrowException, OSError) as error:
        raise source.wrong(f"cannot be read: {error}") from None


def arrow_batches(source: Source, file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    reader = arrow_reader(file)
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        check_end(source, file)
        yield from arrow_reader(file)


def check_end(source: Source, file: pa.NativeFile) -> None:
    """Refuse a stream without the mark that ends it, and one with more bytes behind the mark.

    pyarrow takes the end of the file for the mark, and reads no further than the first one.
    https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format
    """
    file.seek(0)
    end = 0
    for _ in pa.ipc.MessageReader.open_stream(file):  # what they hold is not read
        end = file.tell()
    found, size = file.tell(), file.size()
    if found == end:
        raise source.wrong(
            f"is cut short: expected the mark that ends an Arrow stream at byte {end:,}, found the "
            "end of the file. Copy the file again, or wait until it is written"
        )
    if found < size:
        raise source.wrong(
            f"the Arrow stream ends at byte {found:,}, but the file has {size:,} bytes: the rest "
            "would not be read. Copy the file again; write streams into files of their own"
        )


def arrow_reader(file: pa.NativeFile) -> Any:
    file.seek(0)
    has_footer = file.read(len(ARROW_FILE)) == ARROW_FILE
    file.seek(0)
    return pa.ipc.open_file(file) if has_footer else pa.ipc.open_stream(file)


def columns_of(source: Source, schema: pa.Schema) -> list[str]:
    """The columns to read. ConfigError where one is missing."""
    names = set(schema.names)
    for name in source.names:
        if name not in names:
            raise missing(source, names, name)
    others = [name for name in ("id", *source.optional) if name in names]
    return list(dict.fromkeys([*source.names, *others]))


def arrow_documents(source: Source, batch: pa.RecordBatch, row: int) -> Iterator[Document]:
    """The documents of a batch's rows; `row` is the first one's number."""
    has_ids = "id" in batch.schema.names and "id" not in source.names
    ids = batch["id"] if has_ids else [None] * len(batch)
    contents = source.from_arrow(batch, row)
    for number, (content, own) in enumerate(zip(contents, ids, strict=True), row):
        place = f"row {number}"
        yield content, source.id(None if own is None else as_python(source, own, place), place)


def check_footer(source: Source, metadata: Any) -> None:
    """Refuse a row group whose mean row is too long before a byte of it is read."""
    limit, row = source.limit, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = decoded_bytes(source, group)
        if size > group.num_rows * limit + MIB:  # of headers
            place = f"row {row}" + (f" to {row + group.num_rows - 1}" if group.num_rows > 1 else "")
            raise source.too_long(place, limit=limit)
        row += group.num_rows


def decoded_bytes(source: Source, group: Any) -> int:
    """Bytes of a row group's columns that are read, at least: equal values take few in a file."""
    columns = [group.column(at) for at in range(group.num_columns)]
    read = (*source.names, *source.optional)
    own = [each for each in columns if each.path_in_schema.split(".")[0] in read]
    return sum(
        max(each.total_uncompressed_size, each.num_values * source.value_bytes) for each in own
    )


def check_sizes(source: Source, values: pa.Array, row: int) -> None:
    """Refuse a long value before Python has a copy of it. `row` is the first one's number."""
    if values.nbytes <= DOCUMENT_BYTES:
        return
    limit = source.limit
    is_shared = isinstance(values, pa.DictionaryArray)
    texts = values.dictionary if is_shared else values
    for at, value in enumerate(texts):
        size = bytes_of(value) if is_text(value) else texts.slice(at, 1).nbytes
        if size > limit:
            if is_shared:  # the dictionary is that of later rows, too
                own = values.indices.to_pylist()
                at = own.index(at) if at in own else len(own)
            place = f"row {row + at}" if at < len(values) else f"row {row + at} or later"
            raise source.too_long(place, limit=limit)


def is_text(value: pa.Scalar) -> bool:
    return isinstance(value, pa.StringScalar | pa.LargeStringScalar)


def bytes_of(value: pa.Scalar) -> int:
    """Bytes of a text, without a copy; 0 for null."""
    buffer = value.as_buffer()
    return 0 if buffer is None else int(buffer.size)


def rows_at_once(source: Source, metadata: Any) -> int:
    """Rows that take BATCH_BYTES at most, by the mean size of a row in each row group."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [max(each.total_byte_size, decoded_bytes(source, each)) for each in groups]
    rows = [max(each.num_rows, 1) for each in groups]
    return rows_of(max((size // of for size, of in zip(sizes, rows, strict=True)), default=1))


def rows_of(size: int) -> int:
    """Rows of `size` bytes that are read at a time."""
    return int(min(max(BATCH_BYTES // max(size, 1), 1), BATCH_ROWS))


def as_python(source: Source, value: pa.Scalar, place: str) -> Any:
    try:
        return value.as_py()
    except ValueError as error:  # UTF-8 is not checked by Arrow
        raise source.wrong(f"cannot be read: {error}", place) from None


def without_nulls(value: Any) -> Any:
    """Arrow gives every struct all keys, with null for those that were never there."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
