"""Which characters of a document are learnt, and so which of its tokens."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from pipeline.types import Int64s
from storage.targets import Bools

Span = tuple[int, int]
"""Characters [start, stop)."""


class Text(str):
    """A document as the tokenizer reads it, with what is known of its characters."""

    spans: list[Span] | None = None
    """Those that are learnt, in order; None for all."""
    spelled: Mapping[str, str] = MappingProxyType({})
    """Special tokens that are text here: what each masking character spells."""

    @classmethod
    def of(
        cls, text: str, spans: list[Span] | None = None, spelled: Mapping[str, str] | None = None
    ) -> "Text":
        made = cls(text)
        made.spans, made.spelled = spans, spelled or {}
        return made

    def head(self, length: int) -> "Text":
        """Its first characters."""
        spans = self.spans
        if spans is not None:
            spans = [(start, min(stop, length)) for start, stop in spans if start < length]
        return Text.of(self[:length], spans, self.spelled)


class TokenPlaces:
    """Where a fast tokenizer's tokens stand in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.spellings = {
            number: str(token) for number, token in tokenizer.added_tokens_decoder.items()
        }
        self.added = np.array(list(self.spellings), np.int64)

    def of(self, text: str, ids: list[int], offsets: list[Span]) -> Int64s:
        """int64 [T, 2]: the characters [start, stop) of each token, in the order of the tokens.

        The tokenizer's own offsets leave out white space that a token has, in some tokenizers:
        what is between two tokens belongs to the later one. Some special tokens take in the white
        space beside them: it is not theirs.
        """
        given = np.asarray(offsets, np.int64).reshape(-1, 2)
        starts, stops = given[:, 0], np.maximum.accumulate(given[:, 1])
        before = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
        starts = np.where(starts < given[:, 1], np.minimum(starts, before), before)
        for at in np.flatnonzero(np.isin(ids, self.added)):
            start, stop = offsets[at]
            found = text.find(self.spellings[ids[at]], start, stop)
            if found >= 0:
                starts[at], stops[at] = found, found + len(self.spellings[ids[at]])
        return np.stack([starts, stops], axis=1)


def mask_of(spans: list[Span], places: npt.NDArray[np.int64]) -> Bools:
    """bool [T]: the tokens that share a character with a span. `places` as TokenPlaces gives them.

    So does return_assistant_tokens_mask of transformers.
    """
    mask = np.zeros(len(places), bool)
    for start, stop in spans:
        if start < stop:
            first = np.searchsorted(places[:, 1], start, side="right")
            last = np.searchsorted(places[:, 0], stop, side="left")
            mask[first:last] = True
    return mask
