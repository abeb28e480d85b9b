"""Texts -> token ids, and which of them are learnt."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.spans import Text, TokenPlaces, mask_of
from pipeline.special_tokens import CannotMask, SpecialTokens
from pipeline.token_columns import Marked
from pipeline.types import Int64s
from storage.targets import Bools


@dataclass(frozen=True)
class Tokenizing:
    """A tokenizer, with what a corpus asks of it."""

    tokenizer: PreTrainedTokenizerBase
    corpus: str
    """The name of the corpus, for messages."""
    chats: bool
    """Whether texts are rendered chats. Their template adds its own special tokens."""
    masked: bool
    """Whether texts have spans that are learnt."""
    special: SpecialTokens | None
    """Where special tokens that a document spells are text."""
    add_eos: bool

    def __call__(self, texts: list[Text]) -> Iterator[Marked]:
        """Yield the token ids of each text, int32 [T], and which of them are learnt, bool [T]; None
        for all."""
        plain = not self.chats
        # Chats that spell special tokens are masked; the template's own are tokens in any case.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=plain,
            split_special_tokens=True if self.special and plain else None,
            return_offsets_mapping=self.masked,
            verbose=False,
        )
        for at, text in enumerate(texts):
            ids = encoded["input_ids"][at] if text else []
            mask = None
            if text.spelled:
                ids, places = self.encode_spelled(text)
            elif self.masked:
                places = self.places.of(text, ids, encoded["offset_mapping"][at] if text else [])
            if text.spans is not None:
                mask = mask_of(text.spans, places)
            if plain and text:
                ids, mask = self.with_ends(ids, mask)
            yield np.asarray(ids, np.int32), mask

    def encode_spelled(self, text: Text) -> tuple[list[int], Int64s]:
        assert self.special is not None
        try:
            return self.special.encode(text)
        except CannotMask as error:
            raise ConfigError(
                f"corpus {self.corpus}, the chat that begins {text[:80]!r}: {error}"
            ) from None

    def with_ends(self, ids: list[int], mask: Bools | None) -> tuple[list[int], Bools | None]:
        """One begin-of-text and one end-of-text token, also where the text spells them itself. The
        end is learnt."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        first = int(self.adds_bos and ids[:2] == [bos, bos])
        ids = ids[first:]
        last = len(ids) - int(self.adds_eos and ids[-2:] == [eos, eos])
        end = [eos] if self.add_eos and eos is not None and ids[last - 1 : last] != [eos] else []
        ids = [*ids[:last], *end]
        if mask is not None:
            mask = np.append(mask[first : first + last], [True] * len(end)).astype(bool)
            mask[-1:] |= ids[-1:] == [eos]
        return ids, mask

    @cached_property
    def places(self) -> TokenPlaces:
        return TokenPlaces(self.tokenizer)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself begins each text with the begin-of-text token."""
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return bool(ids[:1] == [self.tokenizer.bos_token_id])

    @cached_property
    def adds_eos(self) -> bool:
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return bool(ids[-1:] == [self.tokenizer.eos_token_id])
