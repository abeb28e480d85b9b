"""Special tokens that a document spells, such as <|im_end|> in a web page, as plain text.

In a chat the template's own special tokens stay tokens. So each spelling in a message is masked by
one character of the private use area, the chat is rendered, and the text is divided at the special
tokens that are left, which are the template's. Each piece is then tokenized with its spellings back
in place, and without special tokens.
"""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.types import Json

PRIVATE = range(0xE000, 0xF900)  # characters without a meaning
NEVER = "(?!)"  # matches nothing
OPTION = "corpus.special_tokens: split"


class Masked(str):
    """A rendered chat with spellings masked."""

    spelled: dict[str, str]
    """The spelling of each mask."""

    @classmethod
    def of(cls, text: str, spelled: dict[str, str]) -> "Masked":
        made = cls(text)
        made.spelled = spelled
        return made

    def head(self, length: int) -> "Masked":
        return Masked.of(self[:length], self.spelled)


class CannotMask(ValueError):
    """Messages whose spellings cannot be told from the template's tokens."""


class SpecialTokens:
    """The special tokens of a tokenizer. Raises ConfigError where it cannot take them as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.ids = {str(token): number for number, token in added if token.special}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or NEVER})")
        for token in self.ids:
            self.check(token, chat)

    def check(self, token: str, chat: bool) -> None:
        known = set(self.ids.values()) - {self.tokenizer.unk_token_id}
        if known & set(self.plain([f"x {token} y{token}"])[0]):
            raise ConfigError(
                f"{OPTION}: the tokenizer makes a special token of the text {token} in any case. "
                "Leave the setting out, and take such documents out of the corpus"
            )
        mask = chr(PRIVATE[0])
        probe = Masked.of(f"x{token}{mask} y{token}{token} z\n{token}", {mask: token})
        if chat and not self.is_exact(probe):
            raise ConfigError(
                f"{OPTION}: this tokenizer reads text after the special token {token} in another "
                "way than text alone, so that messages cannot be tokenized apart from their "
                "template. Leave the setting out, and take such chats out of the corpus"
            )

    def plain(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts whose special tokens are text; none is added."""
        found = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids: list[list[int]] = found["input_ids"]
        return ids

    def mask(self, messages: list[Json], source: str) -> tuple[list[Json], dict[str, str]]:
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
        masked: list[Json] = replaced(
            messages, lambda text: self.pattern.sub(lambda match: masks[match[0]], text)
        )
        return masked, {mask: token for token, mask in masks.items()}

    def encode(self, text: Masked) -> list[int]:
        """Ids of a masked chat. CannotMask where its pieces are not tokenized as the whole is."""
        if not self.is_exact(text):
            raise CannotMask(f"the tokenizer does not read it in pieces, which {OPTION} needs")
        return self.pieces(text, text.spelled)

    def is_exact(self, text: Masked) -> bool:
        """Whether the pieces, with the masks as they are, have the ids of the whole text."""
        whole = self.tokenizer(
            str(text), add_special_tokens=False, split_special_tokens=False, verbose=False
        )
        return bool(self.pieces(text, {}) == whole["input_ids"])

    def pieces(self, text: str, spelled: dict[str, str]) -> list[int]:
        parts = self.pattern.split(text)  # text, token, text, token, … text
        masks = str.maketrans(spelled)
        between = iter(self.plain([part.translate(masks) for part in parts[::2]]))
        ids = list(next(between))
        for token in parts[1::2]:
            ids += [self.ids[token], *next(between)]
        return ids


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
