"""A tokenized corpus in memory, with the masks of what is learnt."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import numpy as np

from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.progress import say
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
    left_out = len(corpus) - len(np.unique(text.documents))
    if corpus.masked and left_out:
        say(
            f"corpus {corpus.config.path}: {left_out:,} of {len(corpus):,} documents have nothing "
            f"to learn within their first {corpus.max_length:,} tokens, and are left out"
        )
    return text
