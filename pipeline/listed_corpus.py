"""The list of a corpus's files that a dump keeps, and what follows from it unread."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerBase

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.corpus_cache import arrow_file, rows_of_files
from pipeline.corpus_content import columns_of, fingerprint_of, guesses_mask, sources_of
from pipeline.corpus_files import relative
from pipeline.models.tokenizers import vocabulary_of
from pipeline.token_columns import TokenColumns
from pipeline.types import Json
from storage.corpus_list import MOST_FILES, CorpusList

SHOWN = 5  # differences in a message


def list_of(corpus: Corpus) -> CorpusList | None:
    """The list of the files of an opened corpus. None where there are none, or a single one, or too
    many, or one whose name is not UTF-8."""
    paths = relative(corpus.files) if corpus.files else []
    if not 1 < len(paths) <= MOST_FILES or not all(map(is_utf8, paths)):
        return None
    _ = corpus.every_document
    documents = rows_of_files(corpus.sources, corpus.digests)
    spans = spans_of(documents, corpus.config.skip, len(corpus))
    return CorpusList(
        fingerprint=corpus.fingerprint(),
        paths=paths,
        sizes=[os.path.getsize(source.path) for source in corpus.sources],
        sha256=corpus.digests,
        documents=documents,
        samples=[corpus.sample_of(*span) for span in spans],
        ids_differ=not corpus.ids.repeats[0].any(),
        first=decided(corpus),
    )


def decided(corpus: Corpus) -> Json:
    """What the first document decides for all."""
    if corpus.config.prompt_column is not None:
        return {"messages": corpus.holds_messages}
    if corpus.tokens is not None and guesses_mask(corpus.config):
        return {"mask": corpus.tokens.mask}
    return {}


def is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def spans_of(documents: list[int], skip: int, selected: int) -> list[tuple[int, int]]:
    """The first document of each file and the one after its last, of those that are selected."""
    starts = [min(max(at - skip, 0), selected) for at in accumulate(documents, initial=0)]
    return list(pairwise(starts))


@dataclass(frozen=True)
class ListedCorpus:
    """A corpus of which only the list is known, with the settings of this process."""

    config: CorpusConfig
    tokenizer: PreTrainedTokenizerBase
    listed: CorpusList
    sample: str
    """That of the plan's `rendering`."""

    def __len__(self) -> int:
        """Number of documents that are selected."""
        every, limit = sum(self.listed.documents) - self.config.skip, self.config.limit
        return max(0, every if limit is None else min(every, limit))

    @property
    def is_decided(self) -> bool:
        """Whether the list has what the first document decides."""
        first = self.listed.first
        if self.config.prompt_column is not None:
            return isinstance(first.get("messages"), bool)
        return not guesses_mask(self.config) or isinstance(first.get("mask", 0), str | None)

    @cached_property
    def tokens(self) -> TokenColumns | None:
        """Where documents are token ids."""
        config = self.config
        if config.tokens_column is None:
            return None
        mask = self.listed.first["mask"] if guesses_mask(config) else config.mask_column
        if config.targets == "all":
            mask = None
        return TokenColumns(columns_of(config)[0], mask, vocabulary_of(self.tokenizer))

    @property
    def content(self) -> list[list[str]]:
        """[path, sha256] of every file."""
        return list(map(list, zip(self.listed.paths, self.listed.sha256, strict=True)))

    @property
    def fingerprint(self) -> str:
        """That of the whole corpus, as an opened one has it."""
        return fingerprint_of(self.config, self.tokens, self.content)

    @property
    def is_cached(self) -> bool:
        """Whether this machine has all documents in its cache."""
        names = [(path, path) for path in self.listed.paths]
        sources = sources_of(self.config, names, self.tokens)
        return arrow_file(sources, self.listed.sha256).exists()

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """As `spans_of`, of every file."""
        return spans_of(self.listed.documents, self.config.skip, len(self))

    def holding(self, first: int, stop: int) -> range:
        """The files that hold documents `first` to `stop`, with empty ones that stand before."""
        found = [at for at, span in enumerate(self.spans) if span[0] < stop and span[1] > first]
        low = found[0]
        while low and not self.listed.documents[low - 1]:
            low -= 1
        return range(low, found[-1] + 1)

    def differences(self, files: list[str], sizes: list[int | None]) -> Iterator[str]:
        """A line for each file that is not as the list has it, by names and bytes."""
        there = dict(zip(self.listed.paths, self.listed.sizes, strict=True))
        here = dict(zip(relative(files), sizes, strict=True))
        for path in sorted(there.keys() | here.keys()):
            if path not in here:
                yield f"{path}: {there[path]:,} bytes in the dump's list, not here"
            elif path not in there:
                yield f"{path}: not in the dump's list, here"
            elif here[path] not in (there[path], None):
                yield f"{path}: {there[path]:,} bytes in the dump's list, {here[path]:,} here"
        if there == here and [*there] != [*here]:
            yield "another order in the dump's list than here"
