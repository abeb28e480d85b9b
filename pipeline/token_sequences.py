"""A tokenized corpus by sequence number, with the masks of what is learnt."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import numpy as np

from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.progress import say
from pipeline.tokenized_parts import stored
from pipeline.types import Int32s, Int64s
from storage.targets import Bools, positions_of


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
    """The token sequences of a corpus: `self[i]` gives the Tokens of sequence i.

    They stay on disk, in the store of tokenized_parts.py, and so do `lengths`, `documents` and
    `target_counts` until they are asked for.
    """

    def __init__(self, corpus: Corpus) -> None:
        """Tokenizes the corpus where that was not done before."""
        self.store = stored(corpus)
        self.chosen: Int64s | None = None
        """Numbers of the store's sequences that are meant; None for all."""

    def spread(self, number: int | None) -> "TokenSequences":
        """At most `number` sequences, evenly spread over the corpus; all for None."""
        if number is None or number >= len(self):
            return self
        found = copy(self)
        found.chosen = np.arange(len(self)) if self.chosen is None else self.chosen
        found.chosen = found.chosen[np.arange(number) * len(self) // number]
        return found

    def __len__(self) -> int:
        return len(self.store) if self.chosen is None else len(self.chosen)

    def __iter__(self) -> Iterator[Tokens]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tokens:
        return Tokens(*self.store[index if self.chosen is None else int(self.chosen[index])])

    @property
    def documents(self) -> Int64s:
        """int64 [len]: document number of each sequence."""
        return self.column("document")

    @property
    def lengths(self) -> Int64s:
        """int64 [len]: number of tokens of each sequence."""
        return self.column("length")

    @property
    def target_counts(self) -> Int64s:
        """int64 [len]: targets of each sequence; its tokens, where all are learnt."""
        return self.column("target_count")

    def column(self, name: str) -> Int64s:
        found = self.store.column(name)
        return found if self.chosen is None else found[self.chosen]

    @property
    def token_count(self) -> int:
        """Tokens of all sequences."""
        return self.store.total("tokens") if self.chosen is None else int(self.lengths.sum())

    @property
    def target_count(self) -> int:
        """The sum of `target_counts`."""
        return self.store.total("targets") if self.chosen is None else int(self.target_counts.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.store.longest if self.chosen is None else int(self.lengths.max())


def read_tokens(corpus: Corpus) -> TokenSequences:
    """All sequences of a corpus; says how many documents have no token to learn.

    Raises ConfigError if none has one.
    """
    text = TokenSequences(corpus)
    if not len(text):
        raise ConfigError(
            f"corpus {corpus.config.path}: none of its {len(corpus):,} documents has a token to "
            "learn. A document needs two tokens or more, and a target behind the first one, within "
            f"its first {corpus.max_length:,} tokens"
        )
    left_out = len(corpus) - text.store.total("documents")
    if corpus.masked and left_out:
        say(
            f"corpus {corpus.config.path}: {left_out:,} of {len(corpus):,} documents have nothing "
            f"to learn within their first {corpus.max_length:,} tokens, and are left out"
        )
    return text
