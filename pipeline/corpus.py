"""Documents -> token sequences.

Files are read by corpus_files.py, corpus_readers.py and corpus_cache.py; hub names by `datasets`.
tokenizing.py makes token ids of a document's text, tokenized_parts.py keeps those of a corpus.

One sequence is one document, or one chunk of a long one; no sequence holds two documents.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pipeline.chats import BadChat, ChatTemplate, listed
from pipeline.config import CorpusConfig
from pipeline.conversation_source import TOOLS, parts_of
from pipeline.corpus_cache import READERS, cache_folder, digests_of, documents_of, local_copy
from pipeline.corpus_content import (
    columns_of,
    fingerprint_of,
    is_structured,
    plain_sources,
    sources_of,
)
from pipeline.corpus_files import find_files, relative
from pipeline.corpus_readers import DOCUMENT_BYTES, MIB, Source, without_nulls
from pipeline.document_ids import DocumentIds
from pipeline.errors import ConfigError
from pipeline.models.tokenizers import behaviour, vocabulary_of
from pipeline.outside import failure
from pipeline.positions import Share
from pipeline.progress import say
from pipeline.spans import Text
from pipeline.special_tokens import SpecialTokens
from pipeline.token_columns import Marked, TokenColumns
from pipeline.token_source import OPTION, guess_mask, mask_of_schema
from pipeline.token_store import VERSION, Row, find_store
from pipeline.tokenizing import Tokenizing
from pipeline.types import Int32s, Int64s, Json
from storage.targets import Bools, positions_of

DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 64, 1 << 20  # for the tokenizer, which uses all cores
SAMPLED, SAMPLED_CHARACTERS = 16, 10_000  # documents whose tokens a plan holds the hash of
FILE_CHARACTERS = 1000  # of a document of each file, for the list of a corpus's files


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

    Where their tokens are in the cache, no document is read before it is asked for. Raises
    ConfigError that names a path, column or file that cannot be read.
    """

    before = 0
    """Documents that are not here, and stand before those that are; see corpus_part.py."""
    ids_differ = False
    """Whether it is known that no two documents have the same id."""

    def __init__(
        self,
        config: CorpusConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        add_eos: bool = True,
        share: Share | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.max_length, self.add_eos, self.share = max_length, add_eos, share
        self.columns = columns_of(config)
        self.column = self.columns[0]
        self.tokens: TokenColumns | None = None
        """Where documents are token ids already."""
        self.files = self.find_files()
        if self.files:
            self.sources = self.make_sources()
            self.digests = self.make_digests()
        elif config.tokens_column is not None:
            schema = self.every_document.features.arrow_schema
            self.tokens = self.token_columns(partial(mask_of_schema, schema))
        key = hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()
        self.store_folder = cache_folder("tokens") / key
        self.store = find_store(self.store_folder)
        """The token sequences, where they were made before."""
        if self.store is None:
            self.check_documents()
        self.check_tokenizer()

    def find_files(self) -> list[str]:
        """The files that are read; none of a hub dataset."""
        return find_files(self.config.path, self.config.split)

    def make_digests(self) -> list[str]:
        """sha256 of each file."""
        return digests_of(self.sources, self.config.reread)

    @cached_property
    def every_document(self) -> datasets.Dataset:
        """Those that are skipped, too; memory-mapped."""
        return self.read_documents() if self.files else hub_documents(self.config)

    def read_documents(self) -> datasets.Dataset:
        """The documents of the files."""
        return documents_of(self.sources, self.digests, self.config.reread)

    @cached_property
    def documents(self) -> datasets.Dataset:
        config, every = self.config, self.every_document
        start, stop = max(config.skip - self.before, 0), len(every)
        if config.limit is not None:
            stop = min(stop, config.skip + config.limit - self.before)
        return every.select(range(start, stop))

    @property
    def first(self) -> int:
        """Number of the first of `documents`."""
        return max(self.before - self.config.skip, 0)

    @cached_property
    def arrow(self) -> datasets.Dataset:
        return self.documents.with_format("arrow")

    def table(self, start: int, stop: int) -> pa.Table:
        """The columns of documents `start` to `stop`."""
        return self.arrow[start - self.first : stop - self.first]

    def check_documents(self) -> None:
        """ConfigError where there are none, or none that can be tokenized as it is asked for."""
        config, names = self.config, self.documents.column_names
        if not len(self.documents):
            raise ConfigError(
                f"corpus {config.path}: no documents"
                + (
                    f" after skip={config.skip}"
                    if len(self.every_document)
                    else "; is the file empty?"
                )
            )
        for name in self.needed:
            if name not in names:
                raise ConfigError(
                    f"corpus {config.path}: no column {name!r}; it has "
                    f"{', '.join(names)}. Set corpus.{self.option}"
                )
        _ = self.special, self.chat
        if self.targets == "assistant" and self.chat is None:
            raise ConfigError(
                f"corpus {config.path}: targets assistant: only chats have an assistant, and the "
                f"first document has text in column {self.column!r}, not messages. Leave targets "
                "out to learn the completions"
            )

    @property
    def splits_special(self) -> bool:
        """Whether special tokens that a document spells are text."""
        return self.config.special_tokens == "split" and self.tokens is None

    @cached_property
    def special(self) -> SpecialTokens | None:
        return SpecialTokens(self.tokenizer, self.holds_messages) if self.splits_special else None

    @cached_property
    def chat(self) -> ChatTemplate | None:
        """Where documents are conversations."""
        return self.chat_template() if self.holds_messages else None

    @cached_property
    def tokenized(self) -> Tokenizing:
        """Makes token ids of texts."""
        return Tokenizing(
            self.tokenizer,
            self.config.path,
            self.chat is not None,
            self.masked,
            self.special,
            self.add_eos,
        )

    @cached_property
    def vocabulary(self) -> int:
        """The tokenizer's ids are below it."""
        return vocabulary_of(self.tokenizer)

    def identity(self) -> Json:
        """What decides the token sequences, as plain JSON; the share of targets does not."""
        config = self.config
        return {
            "version": VERSION,
            "readers": READERS,
            "documents": self.fingerprint(),
            "source": self.sources[0].key if self.files else self.option,
            "targets": self.targets,
            "special_tokens": config.special_tokens,
            "max_length": self.max_length,
            "add_eos": self.add_eos,
            "tokenizer": self.vocabulary if self.tokens else behaviour(self.tokenizer),
        }

    @property
    def targets(self) -> Literal["all", "assistant", "completion", "mask"]:
        """Which tokens are learnt."""
        if self.tokens is not None:
            return "all" if self.tokens.mask is None else "mask"
        return self.config.targets or ("completion" if self.config.prompt_column else "all")

    @property
    def structured(self) -> bool:
        """Whether documents are conversations, or prompts with completions."""
        return is_structured(self.config)

    @property
    def needed(self) -> tuple[str, ...] | list[str]:
        """The columns that `documents` must have; those of files are put together in one."""
        if self.tokens is not None:
            return self.tokens.names
        return self.columns[:1] if self.files else self.columns

    @cached_property
    def holds_messages(self) -> bool:
        """Whether documents are conversations. Prompts may be, and the first one shows it."""
        if self.config.prompt_column is None:
            return self.config.messages_column is not None
        spans = range(0, len(self), DOCUMENTS_AT_ONCE)
        found = (
            each for at in spans for each in self.values(at, min(at + DOCUMENTS_AT_ONCE, len(self)))
        )
        first: Json = next((each for each in found if each is not None), {})
        return isinstance(first.get(self.column), list)

    @property
    def masked(self) -> bool:
        """Whether sequences say which of their tokens are learnt."""
        return self.targets != "all"

    def targets_identity(self) -> Json:
        """How learnt tokens are chosen, for a plan; nothing where all are learnt."""
        return {"which": self.targets} if self.masked else {}

    def check_tokenizer(self) -> None:
        """ConfigError where it cannot tell which tokens are learnt."""
        if self.masked and self.tokens is None and not self.tokenizer.is_fast:
            raise ConfigError(
                f"corpus {self.config.path}: targets {self.targets}: needs a fast tokenizer, which "
                f"says where its tokens stand in the text; {type(self.tokenizer).__name__} does "
                "not. Convert it to a tokenizer.json"
            )

    @property
    def option(self) -> str:
        """The setting that names the column."""
        if self.tokens is not None:
            return OPTION
        if self.config.prompt_column is not None:
            return "prompt_column, completion_column"
        return "messages_column" if self.config.messages_column else "text_column"

    def make_sources(self) -> list[Source]:
        """What reads each file."""
        copies = [(file, local_copy(file)) for file in self.files]
        if self.config.tokens_column is not None:
            self.tokens = self.token_columns(partial(self.guess_mask, copies))
        return sources_of(self.config, copies, self.tokens)

    def guess_mask(self, copies: list[tuple[str, str]]) -> str | None:
        """The column of the mask, by the first document."""
        return guess_mask(plain_sources(self.config, copies))

    def token_columns(self, guess: Callable[[], str | None]) -> TokenColumns:
        """The columns of a token corpus; `guess` finds that of the mask where none is named."""
        config, mask = self.config, self.config.mask_column
        if config.targets == "all":
            mask = None
        elif mask is None and (mask := guess()) is not None:
            say(
                f"corpus {config.path}: the column {mask} says which tokens are learnt; "
                "corpus.targets: all learns all of them"
            )
        return TokenColumns(self.column, mask, self.vocabulary)

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
        return int(self.store.facts["documents"]) if self.store else len(self.documents)

    def fingerprint(self) -> str:
        """sha256 over the content of every file (or the hub's own fingerprint) and the selection.

        The bytes were read when the corpus was opened.
        """
        return fingerprint_of(self.config, self.tokens, self.content())

    def content(self) -> list[Any]:
        """[path, sha256] of every file, or what the hub says, as plain JSON."""
        if self.files:
            return list(map(list, zip(relative(self.files), self.digests, strict=True)))
        return [self.config.path, self.config.split, self.documents._fingerprint]

    def rendering(self) -> Json:
        """What shows how documents become tokens: a sample's ids, and the chat template."""
        if self.store is not None:
            known: Json = self.store.facts["rendering"]
            return known
        found = {"sample": self.sample}
        return found | ({"chat_template": self.chat.identity()} if self.chat else {})

    @cached_property
    def sample(self) -> str:
        """sha256 over the first tokens of some documents."""
        number = min(SAMPLED, len(self))
        return hash_of(self.heads([at * len(self) // number for at in range(number)]))

    def sample_of(self, start: int, stop: int) -> str:
        """16 digits of the sha256 over the first tokens of the first of documents `start` to `stop`
        that has any; over none where the first DOCUMENTS_AT_ONCE of them have none."""
        documents = range(start, min(stop, start + DOCUMENTS_AT_ONCE))
        found = (next(self.heads([each], FILE_CHARACTERS)) for each in documents)
        first = next((head for head in found if len(head[0])), None)
        return hash_of([] if first is None else [first])[:16]

    def heads(self, documents: list[int], length: int = SAMPLED_CHARACTERS) -> Iterator[Marked]:
        """The tokens of the first `length` characters of some documents, or that many tokens."""
        if self.tokens is not None:
            for at in documents:
                tokens, _ = next(self.token_documents(at, at + 1))
                yield tokens[:length], None
        else:
            texts = map(self.text, documents)
            yield from self.tokenized([text.head(length) for text in texts])

    def sequences(self, start: int = 0, stop: int | None = None) -> Iterator[Sequence]:
        """Yield the sequences of documents `start` to `stop`, in order.

        A sequence that predicts no learnt token is left out, and a document without any other.
        """
        for first, found in self.marked(start, len(self) if stop is None else stop):
            ids = self.ids(first, first + len(found))
            for document, (doc_id, one) in enumerate(zip(ids, found, strict=True), first):
                yield from self.chunks(document, doc_id, *one, self.share)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The sequences of documents `start` to `stop` for a store: with all of their targets."""
        for first, found in self.marked(start, stop):
            for document, one in enumerate(found, first):
                for each in self.chunks(document, "", *one, share=None):
                    yield Row.of(document, each.chunk, each.input_ids, each.targets, self.masked)

    def marked(self, start: int, stop: int) -> Iterator[tuple[int, list[Marked]]]:
        """(number of the first document, tokens of some consecutive documents), in order."""
        if self.tokens is not None:
            for at in range(start, stop, DOCUMENTS_AT_ONCE):
                yield at, list(self.token_documents(at, min(at + DOCUMENTS_AT_ONCE, stop)))
            return
        for batch in self.batches(start, stop):
            yield batch[0][0], list(self.tokenized([text for _, text in batch]))

    def token_documents(self, start: int, stop: int) -> Iterator[Marked]:
        """The documents of a token corpus. Those of files were checked as they were read."""
        assert self.tokens is not None
        table = self.table(start, stop)
        rows = zip(*(table[name] for name in self.tokens.names), strict=True)
        for document, row in enumerate(rows, start):
            if self.files:
                tokens, *mask = (value.values.to_numpy(zero_copy_only=False) for value in row)
                yield tokens, mask[0] if mask else None
            else:
                yield self.tokens.of_arrow(row, partial(self.wrong, document))

    def wrong(self, document: int, what: str) -> ConfigError:
        return ConfigError(f"corpus {self.config.path}, document {document}: {what}")

    def chunks(
        self,
        document: int,
        doc_id: str,
        tokens: Int32s,
        targets: Bools | None,
        share: Share | None,
    ) -> list[Sequence]:
        """A document's sequences, of max_length tokens at most, that predict a learnt token.

        None where its prompt, all that is before its first learnt token, is longer than that.
        """
        if targets is not None and not targets[1 : self.max_length].any():
            return []
        found = []
        for number, at in enumerate(range(0, len(tokens), self.max_length)):
            part = slice(at, at + self.max_length)
            mask = None if targets is None else targets[part]
            if share is not None:
                mask = share.draw(doc_id, number, mask, len(tokens[part]))
            sequence = Sequence(doc_id, document, number, tokens[part], False, mask)
            if len(sequence.positions):
                found.append(sequence)
        return [*found[:-1], *(replace(last, ends_document=True) for last in found[-1:])]

    def batches(self, start: int, stop: int) -> Iterator[list[tuple[int, Text]]]:
        """(document, its text) in groups of bounded number and size."""
        batch: list[tuple[int, Text]] = []
        size = 0
        for first in range(start, stop, DOCUMENTS_AT_ONCE):
            values = self.values(first, min(first + DOCUMENTS_AT_ONCE, stop))
            for document, value in enumerate(values, first):
                text = self.render(value, document)
                if batch and size + len(text) > CHARACTERS_AT_ONCE:
                    yield batch
                    batch, size = [], 0
                batch.append((document, text))
                size += len(text)
            yield batch
            batch, size = [], 0

    def values(self, start: int, stop: int) -> Iterator[Any]:
        """Texts, or the columns of conversations by their names; one at a time: 64 documents
        together may be gigabytes."""
        if self.files:
            found = (value.as_py() for value in self.table(start, stop)[self.column])
            if not self.structured:
                return found
            return (value if value is None else parts_of(value) for value in found)
        if not self.structured:
            return iter(self.documents.select_columns(self.column)[start:stop][self.column])
        names = [*self.columns, *({TOOLS} & set(self.documents.column_names))]
        rows = self.documents.select_columns(names)[start:stop]
        return (
            without_nulls(dict(zip(rows, row, strict=True)))
            for row in zip(*rows.values(), strict=True)
        )

    def text(self, document: int) -> Text:
        """One document, as the tokenizer reads it."""
        (value,) = self.values(document, document + 1)
        return self.render(value, document)

    @cached_property
    def ids(self) -> DocumentIds:
        """The documents' ids: `ids(start, stop)`."""
        if self.column == "id" or "id" not in self.documents.column_names:
            return DocumentIds(len(self), None)
        return DocumentIds(len(self), self.own_ids, self.ids_differ)

    def own_ids(self, start: int, stop: int) -> list[str | None]:
        found: list[str | None] = self.table(start, stop)["id"].to_pylist()
        return found

    def render(self, value: Any, document: int) -> Text:
        """A document's text; empty for null."""
        if not self.structured:
            return Text() if value is None else Text(self.as_text(value, self.column, document))
        if value is None or any(name not in value for name in self.columns):
            return Text()
        if self.chat is not None:
            return self.render_chat(self.chat, value, document)
        prompt, completion = (self.as_text(value[name], name, document) for name in self.columns)
        text = prompt + completion
        return Text.of(text, [(len(prompt), len(text))] if self.masked else None)

    def as_text(self, value: Any, column: str, document: int) -> str:
        if isinstance(value, str):
            return value
        raise self.wrong(
            document, f"expected text in column {column!r}, found {type(value).__name__}"
        )

    def render_chat(self, chat: ChatTemplate, value: Json, document: int) -> Text:
        targets = "all" if self.targets == "mask" else self.targets
        try:
            parts = [listed(value[name]) for name in self.columns]
            messages = [message for part in parts for message in part]
            text = chat.render(messages, value.get(TOOLS), targets, prompt=len(parts[0]))
        except BadChat as error:
            raise self.wrong(document, str(error)) from error.__cause__
        if len(text) > DOCUMENT_BYTES:
            raise self.wrong(document, f"rendered to more than {DOCUMENT_BYTES // MIB} MiB of text")
        return text


def hash_of(heads: Iterable[Marked]) -> str:
    """sha256 over tokens and their masks."""
    found = [
        tokens.tolist() if mask is None else [tokens.tolist(), mask.tolist()]
        for tokens, mask in heads
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


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
