"""Documents -> token sequences. All corpora are read here, through `datasets`.

One sequence is one document, or one chunk of a long one; no sequence holds two documents.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from pipeline.config import CorpusConfig
from pipeline.errors import ConfigError
from pipeline.types import Int32s, Int64s

COMPRESSED = (".gz", ".zst")
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
DOCUMENTS_AT_ONCE = 64  # for the tokenizer, which uses all cores


@dataclass(frozen=True)
class Sequence:
    """Tokens of one document, or of one chunk of a long one."""

    doc_id: str
    document: int
    """Number of the document in the corpus, counted from 0."""
    chunk: int
    input_ids: npt.NDArray[np.int32]
    ends_document: bool


class Corpus:
    """The documents of one CorpusConfig, tokenized on demand.

    Raises ConfigError that names a path, column or file that cannot be read.
    """

    def __init__(
        self,
        config: CorpusConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        add_eos: bool = True,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.max_length, self.add_eos = max_length, add_eos
        self.files = find_files(config.path)
        documents = load(config, self.files)
        stop = len(documents) if config.limit is None else config.skip + config.limit
        self.documents = documents.select(range(config.skip, min(stop, len(documents))))
        if not len(self.documents):
            raise ConfigError(
                f"corpus {config.path}: no documents"
                + (f" after skip={config.skip}" if len(documents) else "; is the file empty?")
            )
        self.column = config.messages_column or config.text_column
        if self.column not in self.documents.column_names:
            option = "messages_column" if config.messages_column else "text_column"
            raise ConfigError(
                f"corpus {config.path}: no column {self.column!r}; it has "
                f"{', '.join(self.documents.column_names)}. Set corpus.{option}"
            )
        if config.messages_column and not tokenizer.chat_template:
            raise ConfigError(
                f"corpus {config.path}: messages_column needs a chat template, and the tokenizer "
                "has none; use the chat model's tokenizer, or a text column"
            )

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.documents)

    def fingerprint(self) -> str:
        """sha256 over the content of every file (or the hub's own fingerprint) and the selection.

        Reads all files once. Raises ConfigError, with file and line, for text that is not UTF-8.
        """
        config = self.config
        found: list[Any] = [self.column, config.skip, config.limit]
        if self.files:
            root = os.path.commonpath([os.path.dirname(file) for file in self.files])
            found += [[os.path.relpath(file, root), scan(file)] for file in self.files]
        else:
            found += [config.path, config.split, self.documents._fingerprint]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def sequences(self, start: int = 0, stop: int | None = None) -> Iterator[Sequence]:
        """Yield the sequences of documents `start` to `stop`, in order.

        A document of fewer than two tokens predicts nothing and is skipped.
        """
        stop = len(self) if stop is None else stop
        for first in range(start, stop, DOCUMENTS_AT_ONCE):
            batch = self.documents[first : min(first + DOCUMENTS_AT_ONCE, stop)]
            texts = [self.render(value, first + i) for i, value in enumerate(batch[self.column])]
            ids = batch.get("id") or [None] * len(texts)
            for offset, tokens in enumerate(self.tokenize(texts)):
                if len(tokens) < 2:
                    continue
                document = first + offset
                doc_id = str(document if ids[offset] is None else ids[offset])
                chunks = self.split(tokens)
                for number, chunk in enumerate(chunks):
                    ends = number == len(chunks) - 1
                    yield Sequence(doc_id, document, number, chunk, ends)

    def render(self, value: Any, document: int) -> str:
        """A document's text; empty for null."""
        if value is None:
            return ""
        if self.config.messages_column:
            text = self.tokenizer.apply_chat_template(value, tokenize=False)
            return str(text)
        if not isinstance(value, str):
            raise ConfigError(
                f"corpus {self.config.path}, document {document}: expected text in column "
                f"{self.column!r}, found {type(value).__name__}"
            )
        return value

    def tokenize(self, texts: list[str]) -> Iterator[npt.NDArray[np.int32]]:
        """Yield the token ids of each text; a chat template adds its own special tokens."""
        plain = self.config.messages_column is None
        encoded = self.tokenizer(texts, add_special_tokens=plain, verbose=False)["input_ids"]
        eos = self.tokenizer.eos_token_id if self.add_eos and plain else None
        for text, ids in zip(texts, encoded, strict=True):
            if not text:
                ids = []
            elif eos is not None and (not ids or ids[-1] != eos):
                ids = [*ids, eos]
            yield np.asarray(ids, np.int32)

    def split(self, tokens: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        """Chunks of max_length tokens; a last chunk of one token predicts nothing: drop it."""
        chunks = [
            tokens[at : at + self.max_length] for at in range(0, len(tokens), self.max_length)
        ]
        return chunks if len(chunks[-1]) > 1 else chunks[:-1]


def find_files(path: str) -> list[str]:
    """Sorted files of a path, directory or glob, local or remote (s3://…); empty for a hub name.

    Raises ConfigError for a path without files, and for an unknown or mixed file format.
    """
    path = os.path.expanduser(path)
    remote = "://" in path
    try:
        fs, root = fsspec.core.url_to_fs(path)
        if fs.isdir(root):
            files = [file for file in sorted(fs.find(root)) if format_of(file)]
            if not files:
                raise ConfigError(
                    f"corpus {path}: no JSONL, Parquet or text file in this directory"
                )
        elif fs.isfile(root):
            files = [root]
        else:
            files = sorted(file for file in fs.glob(root) if fs.isfile(file))
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(f"corpus {path}: cannot be read: {error}") from error
    if remote:
        files = [fs.unstrip_protocol(file) for file in files]
    looks_local = path.startswith((".", "/")) or path.count("/") > 1 or format_of(path)
    if not files and (remote or looks_local or fsspec.core.has_magic(path)):
        raise ConfigError(f"corpus {path}: no such file or directory, and no match for a glob")
    formats = {format_of(file) for file in files}
    if None in formats:
        wrong = next(file for file in files if not format_of(file))
        raise ConfigError(
            f"corpus {wrong}: unknown kind of file; expected {', '.join(FORMATS)}, also with "
            f"{' or '.join(COMPRESSED)}"
        )
    if len(formats) > 1:
        raise ConfigError(
            f"corpus {path}: expected files of one format, found {sorted(map(str, formats))}"
        )
    return files


def format_of(file: str) -> str | None:
    stem = file
    for suffix in COMPRESSED:
        stem = stem.removesuffix(suffix)
    return FORMATS.get(os.path.splitext(stem)[1].lower())


def load(config: CorpusConfig, files: list[str]) -> datasets.Dataset:
    """All documents, memory-mapped from the Arrow cache that `datasets` keeps."""
    datasets.disable_progress_bars()
    try:
        if not files:
            return datasets.load_dataset(config.path, split=config.split)
        copies = [local_copy(file) for file in files]
        if all(os.path.getsize(copy) == 0 for copy in copies):
            raise ConfigError(f"corpus {config.path}: empty")
        kind = format_of(files[0])
        options = {"sample_by": "document"} if kind == "text" else {}
        return datasets.load_dataset(kind, data_files=copies, split="train", **options)
    except ConfigError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers raise
        for file in files:
            scan(file)  # raises with the line number if the reason is text that is not UTF-8
        reason = error.__cause__ or error
        raise ConfigError(
            f"corpus {config.path}: cannot be read: {type(reason).__name__}: {reason}"
            + ("" if files else " (not a local path, so it was read as a hub name)")
        ) from error


def scan(file: str) -> str:
    """sha256 of the file's bytes; ConfigError, with the line, for a text file that is not UTF-8."""
    copy = local_copy(file)
    with open(copy, "rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()
    if format_of(file) != "parquet":
        opened = fsspec.open(copy, "rb", compression="infer")
        with opened as plain, io.BufferedReader(plain) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise ConfigError(
                        f"corpus {file}, line {number}: not UTF-8 (byte {line[error.start]:#x} at "
                        f"{error.start}). Convert the file, e.g. with iconv, or remove the line"
                    ) from None
    return digest


def local_copy(file: str) -> str:
    """Path of a local file, or of a remote file's copy beside the Arrow cache.

    The copy is made once per version of the content. `datasets` itself reads no remote file if
    HF_HUB_OFFLINE is set.
    """
    if "://" not in file:
        return file
    fs, root = fsspec.core.url_to_fs(file)
    version = hashlib.sha256(f"{file} {fs.ukey(root)}".encode()).hexdigest()[:20]
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "remote" / version / os.path.basename(root)
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        own = copy.with_name(f".{os.getpid()}-{copy.name}")
        fs.get_file(root, str(own))
        os.replace(own, copy)
    return str(copy)


class TokenSequences:
    """A tokenized corpus in memory: one flat array of ids, and the start of each sequence."""

    def __init__(self, corpus: Corpus) -> None:
        sequences = list(corpus.sequences())
        self.documents = np.array([sequence.document for sequence in sequences], np.int64)
        """[len]: document number of each sequence."""
        self._join([sequence.input_ids for sequence in sequences])

    def _join(self, parts: list[Int32s]) -> None:
        self.ids = np.concatenate([np.zeros(0, np.int32), *parts])
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def spread(self, number: int | None) -> "TokenSequences":
        """At most `number` sequences, evenly spread over the corpus; all for None."""
        if number is None or number >= len(self):
            return self
        chosen = np.arange(number) * len(self) // number
        found = copy(self)
        found.documents = self.documents[chosen]
        found._join([self[int(index)] for index in chosen])
        return found

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[Int32s]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Int32s:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> Int64s:
        """Number of tokens of each sequence."""
        return np.diff(self.starts)


def read_tokens(corpus: Corpus) -> TokenSequences:
    """All sequences of a corpus. Raises ConfigError if no document has two tokens."""
    text = TokenSequences(corpus)
    if not len(text):
        raise ConfigError(
            f"corpus {corpus.config.path}: no document has two tokens or more, so there is nothing "
            "to predict"
        )
    return text
