"""Documents -> token sequences.

Files are read by corpus_files.py, corpus_readers.py and corpus_cache.py; hub names by `datasets`.

One sequence is one document, or one chunk of a long one; no sequence holds two documents.
"""

import hashlib
import json
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from pipeline.chats import BadChat, ChatTemplate
from pipeline.config import CorpusConfig
from pipeline.corpus_cache import cached_documents
from pipeline.corpus_files import find_files, relative
from pipeline.corpus_readers import DOCUMENT_BYTES, MIB, without_nulls
from pipeline.errors import ConfigError
from pipeline.outside import failure
from pipeline.special_tokens import CannotMask, Masked, SpecialTokens
from pipeline.types import Int32s, Int64s, Json
from storage.targets import Bools, positions_of

DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 64, 1 << 20  # for the tokenizer, which uses all cores

IDS_AT_ONCE = 10_000
SAMPLED, SAMPLED_CHARACTERS = 16, 10_000  # documents whose tokens a plan holds the hash of


@dataclass(frozen=True)
class Sequence:
    """Tokens of one document, or of one chunk of a long one."""

    doc_id: str
    document: int
    """Number of the document in the corpus, counted from 0."""
    chunk: int
    input_ids: npt.NDArray[np.int32]
    ends_document: bool
    """Whether it is the last sequence of its document."""
    targets: Bools | None = None
    """bool [tokens]: which tokens are learnt; None for all."""

    @property
    def positions(self) -> Int64s:
        """int64 [P]: the positions that predict a learnt token."""
        return positions_of(self.targets, len(self.input_ids))


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
        self.column = config.messages_column or config.text_column
        self.files = find_files(config.path, config.split)
        if self.files:
            chat = config.messages_column is not None
            documents, self.digests = cached_documents(self.files, self.column, chat)
        else:
            documents = hub_documents(config)
        stop = len(documents) if config.limit is None else config.skip + config.limit
        self.documents = documents.select(range(config.skip, min(stop, len(documents))))
        self.arrow = self.documents.with_format("arrow")
        if not len(self.documents):
            raise ConfigError(
                f"corpus {config.path}: no documents"
                + (f" after skip={config.skip}" if len(documents) else "; is the file empty?")
            )
        if self.column not in self.documents.column_names:
            option = "messages_column" if config.messages_column else "text_column"
            raise ConfigError(
                f"corpus {config.path}: no column {self.column!r}; it has "
                f"{', '.join(self.documents.column_names)}. Set corpus.{option}"
            )
        chat = config.messages_column is not None
        split = config.special_tokens == "split"
        self.special = SpecialTokens(tokenizer, chat) if split else None
        self.chat = self.chat_template() if chat else None

    def chat_template(self) -> ChatTemplate:
        try:
            return ChatTemplate(self.tokenizer, self.special)
        except BadChat as error:
            raise ConfigError(
                f"corpus {self.config.path}: messages_column needs a chat template, and the "
                f"tokenizer has none ({error}); use the chat model's tokenizer, or a text column"
            ) from None

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.documents)

    def fingerprint(self) -> str:
        """sha256 over the content of every file (or the hub's own fingerprint) and the selection.

        The bytes were read when the corpus was opened.
        """
        config = self.config
        found: list[Any] = [self.column, config.skip, config.limit]
        if self.files:
            found += map(list, zip(relative(self.files), self.digests, strict=True))
        else:
            found += [config.path, config.split, self.documents._fingerprint]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def rendering(self) -> Json:
        """What shows how documents become tokens: a sample's ids, and the chat template."""
        number = min(SAMPLED, len(self))
        texts = [self.text(at * len(self) // number) for at in range(number)]
        length = SAMPLED_CHARACTERS
        heads = [t.head(length) if isinstance(t, Masked) else t[:length] for t in texts]
        ids = self.tokenize(heads)
        sample = hashlib.sha256(json.dumps([each.tolist() for each in ids]).encode()).hexdigest()
        return {"sample": sample} | ({"chat_template": self.chat.identity()} if self.chat else {})

    def sequences(self, start: int = 0, stop: int | None = None) -> Iterator[Sequence]:
        """Yield the sequences of documents `start` to `stop`, in order.

        A sequence that predicts no learnt token is left out, and a document without any other.
        """
        stop = len(self) if stop is None else stop
        for batch in self.batches(start, stop):
            documents, doc_ids, texts = zip(*batch, strict=True)
            tokenized = self.tokenize(list(texts))
            for document, doc_id, tokens in zip(documents, doc_ids, tokenized, strict=True):
                yield from self.chunks(document, doc_id, tokens, None)

    def chunks(
        self, document: int, doc_id: str, tokens: Int32s, targets: Bools | None
    ) -> list[Sequence]:
        """A document's sequences, of max_length tokens at most, that predict a learnt token."""
        found = []
        for number, at in enumerate(range(0, len(tokens), self.max_length)):
            part = slice(at, at + self.max_length)
            mask = None if targets is None else targets[part]
            sequence = Sequence(doc_id, document, number, tokens[part], False, mask)
            if len(sequence.positions):
                found.append(sequence)
        return [*found[:-1], *(replace(last, ends_document=True) for last in found[-1:])]

    def batches(self, start: int, stop: int) -> Iterator[list[tuple[int, str, str]]]:
        """(document, its id, its text) in groups of bounded number and size."""
        batch: list[tuple[int, str, str]] = []
        size = 0
        for first in range(start, stop, DOCUMENTS_AT_ONCE):
            last = min(first + DOCUMENTS_AT_ONCE, stop)
            rows = zip(self.ids(first, last), self.values(first, last), strict=True)
            for document, (doc_id, value) in enumerate(rows, first):
                text = self.render(value, document)
                if batch and size + len(text) > CHARACTERS_AT_ONCE:
                    yield batch
                    batch, size = [], 0
                batch.append((document, doc_id, text))
                size += len(text)
            yield batch
            batch, size = [], 0

    def values(self, start: int, stop: int) -> Iterator[Any]:
        """The column's values, one at a time: 64 documents together may be gigabytes."""
        if not self.files:
            return iter(self.documents.select_columns(self.column)[start:stop][self.column])
        return (value.as_py() for value in self.arrow[start:stop][self.column])

    def text(self, document: int) -> str:
        """One document, as the tokenizer reads it."""
        (value,) = self.values(document, document + 1)
        return self.render(value, document)

    def ids(self, start: int, stop: int) -> list[str]:
        """A different id for each document: its own, or its number where it has none.

        Of documents with one id, such as ids that begin anew in each file, the first one keeps it;
        the others get their number behind it, as 7#1003.
        """
        found = self.own_ids(start, stop)
        repeats, known = self.repeats
        for at in np.flatnonzero(repeats[start:stop]).tolist():
            found[at] += f"#{start + at}"
            while is_in(short_hash(found[at]), known):
                found[at] += "#"
        return found

    def own_ids(self, start: int, stop: int) -> list[str]:
        """The ids as the corpus has them; two documents may have the same."""
        own = [None] * (stop - start)
        if self.column != "id" and "id" in self.documents.column_names:
            own = self.arrow[start:stop]["id"].to_pylist()
        return [str(at if value is None else value) for at, value in enumerate(own, start)]

    @cached_property
    def repeats(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """([documents]: whether an earlier document has the id; sorted hashes of all ids)."""
        repeats = np.zeros(len(self), bool)
        if self.column == "id" or "id" not in self.documents.column_names:
            return repeats, np.zeros(0, np.uint64)
        spans = range(0, len(self), IDS_AT_ONCE)
        ids = (each for at in spans for each in self.own_ids(at, min(at + IDS_AT_ONCE, len(self))))
        hashes = np.fromiter(map(short_hash, ids), np.uint64, len(self))
        known, first = np.unique(hashes, return_index=True)
        repeats[:] = True
        repeats[first] = False
        return repeats, known

    def render(self, value: Any, document: int) -> str:
        """A document's text; empty for null."""
        if value is None:
            return ""
        if self.chat:
            return self.render_chat(self.chat, value, document)
        if not isinstance(value, str):
            raise ConfigError(
                f"corpus {self.config.path}, document {document}: expected text in column "
                f"{self.column!r}, found {type(value).__name__}"
            )
        return value

    def render_chat(self, chat: ChatTemplate, value: Any, document: int) -> str:
        place = f"corpus {self.config.path}, document {document}"
        try:
            text = chat.render(json.loads(value) if self.files else without_nulls(value))
        except BadChat as error:
            raise ConfigError(f"{place}: {error}") from error.__cause__
        if len(text) > DOCUMENT_BYTES:
            raise ConfigError(f"{place}: rendered to more than {DOCUMENT_BYTES // MIB} MiB of text")
        return text

    def tokenize(self, texts: list[str]) -> Iterator[npt.NDArray[np.int32]]:
        """Yield the token ids of each text; a chat template adds its own special tokens."""
        plain = self.config.messages_column is None
        # Chats that spell special tokens are masked; the template's own are tokens in any case.
        split = True if self.special and plain else None
        encoded = self.tokenizer(
            texts, add_special_tokens=plain, split_special_tokens=split, verbose=False
        )["input_ids"]
        for text, ids in zip(texts, encoded, strict=True):
            if not text:
                ids = []
            elif isinstance(text, Masked):
                ids = self.encode_masked(text)
            elif plain:
                ids = self.with_ends(ids)
            yield np.asarray(ids, np.int32)

    def encode_masked(self, text: Masked) -> list[int]:
        assert self.special is not None
        try:
            return self.special.encode(text)
        except CannotMask as error:
            raise ConfigError(
                f"corpus {self.config.path}, the chat that begins {text[:80]!r}: {error}"
            ) from None

    def with_ends(self, ids: list[int]) -> list[int]:
        """One begin-of-text and one end-of-text token, also where the text spells them itself."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.adds_bos and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if self.adds_eos and ids[-2:] == [eos, eos]:
            ids = ids[:-1]
        if self.add_eos and eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return ids

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself begins each text with the begin-of-text token."""
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return bool(ids[:1] == [self.tokenizer.bos_token_id])

    @cached_property
    def adds_eos(self) -> bool:
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return bool(ids[-1:] == [self.tokenizer.eos_token_id])


def short_hash(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_in(value: int, ordered: npt.NDArray[np.uint64]) -> bool:
    at = int(np.searchsorted(ordered, np.uint64(value)))
    return at < len(ordered) and int(ordered[at]) == value


def hub_documents(config: CorpusConfig) -> datasets.Dataset:
    """All documents of a hub dataset, memory-mapped from the cache that `datasets` keeps."""
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(config.path, split=config.split)
    except Exception as error:  # `datasets` raises whatever its readers raise
        reason = error.__cause__ or error
        message = (
            f"corpus {config.path}: cannot be read: {type(reason).__name__}: {reason} (not a local "
            "path, so it was read as a hub name)"
        )
        raise failure(message, error) from error


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one sequence, and which of them are learnt."""

    input_ids: Int32s
    targets: Bools | None = None
    """bool [tokens]: which tokens are learnt; None for all."""

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def positions(self) -> Int64s:
        """int64 [P]: the positions that predict a learnt token."""
        return positions_of(self.targets, len(self))


class TokenSequences:
    """A tokenized corpus in memory: flat arrays of ids and marks, and the start of each sequence.

    `self[i]` gives the Tokens of sequence i.
    """

    def __init__(self, corpus: Corpus) -> None:
        sequences = list(corpus.sequences())
        self.documents = np.array([sequence.document for sequence in sequences], np.int64)
        """[len]: document number of each sequence."""
        self._join([Tokens(sequence.input_ids, sequence.targets) for sequence in sequences])

    def _join(self, parts: list[Tokens]) -> None:
        self.ids = np.concatenate([np.zeros(0, np.int32), *(part.input_ids for part in parts)])
        self.starts = np.cumsum([0, *map(len, parts)])
        self.targets: Bools | None = None
        """bool [tokens of all]: which are learnt; None for all."""
        self.target_counts = self.lengths
        """int64 [len]: targets of each sequence; its tokens, where all are learnt."""
        if any(part.targets is not None for part in parts):
            self.targets = np.concatenate([marks(part) for part in parts])
            self.target_counts = np.array([len(part.positions) for part in parts], np.int64)

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

    def __iter__(self) -> Iterator[Tokens]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tokens:
        part = slice(self.starts[index], self.starts[index + 1])
        return Tokens(self.ids[part], None if self.targets is None else self.targets[part])

    @property
    def lengths(self) -> Int64s:
        """Number of tokens of each sequence."""
        return np.diff(self.starts)


def marks(tokens: Tokens) -> Bools:
    """bool [tokens]: which tokens are learnt, without the first one, which nothing predicts."""
    found = np.zeros(len(tokens), bool)
    found[tokens.positions + 1] = True
    return found


def read_tokens(corpus: Corpus) -> TokenSequences:
    """All sequences of a corpus. Raises ConfigError if no document has a token to learn."""
    text = TokenSequences(corpus)
    if not len(text):
        raise ConfigError(
            f"corpus {corpus.config.path}: none of its {len(corpus):,} documents has a token to "
            "learn. A document needs two tokens or more, and a target behind the first one"
        )
    return text
