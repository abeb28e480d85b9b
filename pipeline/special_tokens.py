"""Special tokens that a document spells, such as <|im_end|> in a web page, as plain text.

In a chat the template's own special tokens stay tokens. So each spelling in a message is masked by
one character of the private use area, the chat is rendered, and the text is divided at the special
tokens that are left, which are the template's. Each piece is then tokenized with its spellings back
in place, and without special tokens.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.spans import Text, TokenPlaces
from pipeline.types import Int64s

PRIVATE = range(0xE000, 0xF900)  # characters without a meaning
NEVER = "(?!)"  # matches nothing
OPTION = "corpus.special_tokens: split"


class CannotMask(ValueError):
    """Messages whose spellings cannot be told from the template's tokens."""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens of a tokenizer with their ids."""
    added = tokenizer.added_tokens_decoder.items()
    return {str(token): number for number, token in added if token.special}


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of some tokens, the longest that there is."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or NEVER})")


class SpecialTokens:
    """The special tokens of a tokenizer. Raises ConfigError where it cannot take them as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
        self.tokenizer = tokenizer
        self.ids = special_ids(tokenizer)
        self.pattern = pattern_of(self.ids)
        self.places = TokenPlaces(tokenizer)
        for token in self.ids:
            self.check(token, chat)

    def check(self, token: str, chat: bool) -> None:
        known = set(self.ids.values()) - {self.tokenizer.unk_token_id}
        if known & set(self.plain([f"x {token} y{token}"])["input_ids"][0]):
            raise ConfigError(
                f"{OPTION}: the tokenizer makes a special token of the text {token} in any case. "
                "Leave the setting out, and take such documents out of the corpus"
            )
        mask = chr(PRIVATE[0])
        probe = Text.of(f"x{token}{mask} y{token}{token} z\n{token}", spelled={mask: token})
        if chat and not self.is_exact(probe):
            raise ConfigError(
                f"{OPTION}: this tokenizer reads text after the special token {token} in another "
                "way than text alone, so that messages cannot be tokenized apart from their "
                "template. Leave the setting out, and take such chats out of the corpus"
            )

    def plain(self, texts: list[str], **more: bool) -> Any:
        """The tokenizer's `input_ids` (and more) of texts whose special tokens are text; none is
        added."""
        return self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False, **more
        )

    def mask(self, messages: Any, source: str) -> tuple[Any, dict[str, str]]:
        """(messages with every spelling masked; the spelling of each mask, none as a rule)."""
        texts = list(strings(messages))
        found = sorted({match for text in texts for match in self.pattern.findall(text)})
        if not found:
            return messages, {}
        used = set(source).union(*texts)
        free = [chr(code) for code in PRIVATE if chr(code) not in used]
        if len(free) < len(found):
            raise CannotMask("too many special tokens and private characters in one chat")
        masks = dict(zip(found, free, strict=False))
        masked = replaced(
            messages, lambda text: self.pattern.sub(lambda match: masks[match[0]], text)
        )
        return masked, {mask: token for token, mask in masks.items()}

    def encode(self, text: Text) -> tuple[list[int], Int64s]:
        """(ids of a masked chat, [T, 2]: the characters of each in the masked text; without rows
        where the text has no spans). CannotMask where its pieces have other ids than the whole."""
        if not self.is_exact(text):
            raise CannotMask(f"the tokenizer does not read it in pieces, which {OPTION} needs")
        return self.pieces(text)

    def is_exact(self, text: Text) -> bool:
        """Whether the pieces, with the masks as they are, have the ids of the whole text."""
        whole = self.tokenizer(
            str(text), add_special_tokens=False, split_special_tokens=False, verbose=False
        )
        return bool(self.pieces(Text(text))[0] == whole["input_ids"])

    def pieces(self, text: Text) -> tuple[list[int], Int64s]:
        parts = self.pattern.split(text)  # text, token, text, token, … text
        masks = str.maketrans(dict(text.spelled))
        spelled = [part.translate(masks) for part in parts[::2]]
        placed = text.spans is not None
        found = self.plain(spelled, return_offsets_mapping=placed)
        ids = list(found["input_ids"][0])
        for token, own in zip(parts[1::2], found["input_ids"][1:], strict=True):
            ids += [self.ids[token], *own]
        return ids, self.placed(text, parts, spelled, found) if placed else np.zeros((0, 2), int)

    def placed(self, text: Text, parts: list[str], spelled: list[str], found: Any) -> Int64s:
        """[T, 2]: the characters of each token of the parts in the masked text."""
        places, at = [], 0
        for number, part in enumerate(parts):
            if number % 2:
                own = np.array([[0, len(part)]])
            else:
                ids, offsets = (found[key][number // 2] for key in ("input_ids", "offset_mapping"))
                own = self.places.of(spelled[number // 2], ids, offsets)
                own = unspelled(part, text.spelled, own)
            places.append(own + at)
            at += len(part)
        return np.concatenate(places)


def unspelled(text: str, spelled: Mapping[str, str], places: Int64s) -> Int64s:
    """Places within the text whose masks are spelled, as places within the masked text."""
    lengths = [len(spelled.get(character, character)) for character in text]
    owner = np.repeat(np.arange(len(text)), lengths)
    starts, stops = places[:, 0], places[:, 1]
    ends = np.append(owner, len(text))  # of an empty place at the end
    return np.stack([ends[starts], np.where(starts < stops, owner[stops - 1] + 1, ends[stops])], 1)


def strings(value: Any) -> Any:
    """Every text within messages, the names of keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


def replaced(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): replaced(part, change) for key, part in value.items()}
    return [replaced(part, change) for part in value] if isinstance(value, list) else value
