"""The documents of a corpus's files in one Arrow file, which is found by the files' content.

A file is known by the sha256 of its bytes (file_digests.py), not by its name. Several processes may
write the same one at once: each writes its own file, and renames it when it is complete.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipeline import file_digests
from pipeline.cache_use import in_use, use
from pipeline.corpus_files import compression_of, format_of
from pipeline.corpus_readers import MIB, Document, Source
from pipeline.errors import FailedError
from pipeline.outside import failure

READERS = 2  # raise it where a reader gives other documents for the same bytes, or refuses them
LAYOUT = 2  # raise it where the Arrow file holds them in another way
BATCH_DOCUMENTS, BATCH_BYTES = 1000, 16 * MIB
ROWS = b"documents"  # metadata of the last batch: the documents of each file, as a JSON list
STRONG_TAGS = ("ETag", "etag", "md5Hash", "content_md5")  # what stores call a checksum of content


def cached_documents(
    sources: list[Source], reread: bool = False
) -> tuple[datasets.Dataset, list[str]]:
    """(all documents, memory-mapped, with the sources' fields and `id`; sha256 of each file).

    Raises what `digests_of` and `documents_of` do.
    """
    digests = digests_of(sources, reread)
    return documents_of(sources, digests, reread), digests


def digests_of(sources: list[Source], reread: bool = False) -> list[str]:
    """sha256 of each file. `reread` reads them whole, also large ones that are known from before.

    Raises ConfigError for a file that cannot be read, and FailedError where the cache cannot be
    written.
    """
    memory = None if reread else cache_folder("digests")
    try:
        return file_digests.digests_of([source.path for source in sources], memory)
    except OSError as error:
        for source in sources:
            if error.filename == source.path:
                raise source.wrong(f"cannot be read: {error}") from None
        raise FailedError(f"corpus cache {memory}: {error}. Set HF_DATASETS_CACHE") from error


def documents_of(
    sources: list[Source], digests: list[str], reread: bool = False
) -> datasets.Dataset:
    """All documents, memory-mapped, of files that have these digests.

    Raises ConfigError, with file and line, for what cannot be read, and FailedError where the
    cache cannot be written.
    """
    path = arrow_file(sources, digests)
    if not use(path):
        build(path, sources, digests, reread)
        use(path)
    return datasets.Dataset.from_file(str(path))


def arrow_file(sources: list[Source], digests: list[str]) -> Path:
    """Where the documents of files with these digests are, or will be. Nothing is read."""
    kinds = [[format_of(source.name), compression_of(source.name)] for source in sources]
    found = [READERS, LAYOUT, *sources[0].key, kinds, digests]
    key = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return cache_folder("corpora") / f"{key}.arrow"


def rows_of_files(sources: list[Source], digests: list[str]) -> list[int]:
    """Documents of each file, of those that `documents_of` has put together."""
    path = arrow_file(sources, digests)
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        *_, (_, metadata) = stream.iter_batches_with_custom_metadata()
    found: list[int] = json.loads(metadata[ROWS])
    return found


def cache_folder(name: str) -> Path:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FailedError(f"corpus cache {folder}: {error}. Set HF_DATASETS_CACHE") from error
    return folder


def build(path: Path, sources: list[Source], digests: list[str], reread: bool) -> None:
    """Write the Arrow file: complete, or not at all."""
    kind = sources[0]
    schema = pa.schema({"id": pa.string()} | kind.fields)  # a column `id` may be the text itself
    own = Path(tempfile.mkdtemp(prefix=".building-", dir=path.parent))
    try:
        with open(own / path.name, "wb") as file:
            in_use(file.fileno())
            with pa.ipc.new_stream(file, schema) as stream:
                rows = [0] * len(sources)
                for batch in batches(counted(sources, rows), kind.size):
                    contents, ids = map(list, zip(*batch, strict=True))
                    columns = dict(zip(kind.fields, kind.arrays(contents), strict=True))
                    columns = {"id": pa.array(ids, pa.string())} | columns
                    stream.write_batch(pa.record_batch(list(columns.values()), schema=schema))
                stream.write_batch(pa.RecordBatch.from_pylist([], schema), {ROWS: json.dumps(rows)})
            file.flush()
            os.fsync(file.fileno())
        for source, before, after in zip(
            sources, digests, digests_of(sources, reread), strict=True
        ):
            if before != after:
                raise source.wrong("changed while it was read; wait until it is complete")
        os.replace(own / path.name, path)
    except OSError as error:  # the readers' own are ConfigErrors by now
        raise FailedError(
            f"corpus cache {path.parent}: {error}. Make room there, or set HF_DATASETS_CACHE"
        ) from error
    finally:
        (own / path.name).unlink(missing_ok=True)
        own.rmdir()


def counted(sources: list[Source], rows: list[int]) -> Iterator[Document]:
    """The documents of all files; `rows` counts those of each."""
    for number, source in enumerate(sources):
        for document in source.documents():
            rows[number] += 1
            yield document


def batches(
    documents: Iterable[Document], size_of: Callable[[Any], int]
) -> Iterator[list[Document]]:
    """Documents in groups of bounded number and size."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += size_of(document[0])
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def local_copy(file: str) -> str:
    """Path of a local file, or of a remote file's copy beside the Arrow cache.

    A copy is used again only where the store has a checksum of the content, and it is the same.
    Raises FailedError where the store does not answer, ConfigError where it has no such file.
    """
    if "://" not in file or os.path.exists(file):
        return file
    try:
        fs, root = fsspec.core.url_to_fs(file)
        if isinstance(fs, LocalFileSystem):
            return str(root)
        info: dict[str, Any] = fs.info(root)
        tags = [str(info[tag]) for tag in STRONG_TAGS if info.get(tag)]
        version = hashlib.sha256(f"{file} {tags}".encode()).hexdigest()[:20]
        folder = cache_folder("remote")
        copy = folder / version / os.path.basename(root)
        if tags and use(copy):
            return str(copy)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".copying-", dir=folder) as own:
            fs.get_file(root, os.path.join(own, "content"))
            os.replace(os.path.join(own, "content"), copy)
        use(copy)
    except FailedError:
        raise
    except Exception as error:  # every file system library raises its own types
        message = f"corpus {file}: cannot be copied: {type(error).__name__}: {error}"
        raise failure(message, error) from error
    return str(copy)
