"""Chat messages -> text, by the tokenizer's chat template."""

import hashlib
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.chat_renderer import RENDERER, CannotRender
from pipeline.special_tokens import CannotMask, Masked, SpecialTokens
from pipeline.types import Json

TODAY = datetime(2024, 7, 26)
"""What a template's clock shows, always: rows must not depend on the day they were rendered on.
Templates of Llama 3.2 take this date where there is no clock."""
WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
MARK = "a part of text"


class BadChat(ValueError):
    """Messages that cannot be rendered. The message says why, but not where they are."""


class ChatTemplate:
    """A tokenizer's chat template. Raises BadChat where the tokenizer has none.

    With `special`, the text of a chat that spells special tokens has them masked.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens | None = None
    ) -> None:
        self.tokenizer, self.special = tokenizer, special
        try:
            self.source = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise BadChat(str(error).splitlines()[0]) from None

    def identity(self) -> Json:
        """What decides the text beside the messages: the template, and the date if it asks."""
        found = {"fingerprint": hashlib.sha256(self.source.encode()).hexdigest()}
        return found | ({"date": f"{TODAY:%Y-%m-%d}"} if self.has_clock else {})

    @property
    def has_clock(self) -> bool:
        """Whether the template asks for the time; it gets a clock that stands still."""
        return "strftime_now" in self.source

    def render(self, messages: Any) -> str:
        """The text of a list of messages; empty for none. Raises BadChat, also where the template
        takes more time or memory than it may (chat_renderer.py)."""
        checked = [self.message(each, f"message {at}") for at, each in enumerate(listed(messages))]
        if not checked:
            return ""
        try:
            text = self.masked(checked) if self.special else self.apply(checked)
            text.encode()
        except (CannotRender, CannotMask, UnicodeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            name = self.tokenizer.name_or_path
            raise BadChat(f"the chat template of {name} cannot render it: {reason}") from error
        return text

    def masked(self, messages: list[Json]) -> str:
        assert self.special is not None
        messages, spelled = self.special.mask(messages, self.source)
        text = self.apply(messages)
        if any(f"\\u{ord(mask):04x}" in text for mask in spelled):
            raise CannotMask("the template escapes characters, and a message spells special tokens")
        return Masked.of(text, spelled) if spelled else text

    def apply(self, messages: list[Json]) -> str:
        return RENDERER.render(self.template, messages)

    @cached_property
    def template(self) -> Json:
        """What apply_chat_template gives to jinja beside the messages."""
        now = TODAY.isoformat() if self.has_clock else None
        given = {**self.tokenizer.special_tokens_map, "add_generation_prompt": False}
        return {"source": self.source, "given": given, "now": now}

    def message(self, message: Any, place: str) -> Json:
        """A message without its null keys, which are as good as absent."""
        if not isinstance(message, dict):
            raise BadChat(
                f"{place}: expected an object with role and content, found {kind(message)}"
            )
        message = {key: value for key, value in message.items() if value is not None}
        if "role" not in message and {"from", "value"} <= set(message):
            raise BadChat(
                f"{place}: has from and value, as ShareGPT does. Rename them to role and content, "
                "and human and gpt to user and assistant"
            )
        if not isinstance(message.get("role"), str):
            raise BadChat(f"{place}: expected text in role, found {kind(message.get('role'))}")
        if "content" in message:
            return message | {"content": self.content(message["content"], place)}
        if not any(name in message for name in WITHOUT_CONTENT):
            raise BadChat(f"{place}: no content, nor {', '.join(WITHOUT_CONTENT)}")
        return message

    def content(self, content: Any, place: str) -> Any:
        """Text, or parts where the template takes them; parts of text are joined where not."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise BadChat(f"{place}: expected text in content, found {kind(content)}")
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise BadChat(f"{place}: expected parts with a type in content, found {kind(part)}")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise BadChat(f"{place}: expected text in a part, found {kind(part.get('text'))}")
            if part["type"] != "text" and not self.takes_parts:
                raise BadChat(
                    f"{place}: a part is {part['type']}; the chat template takes text only"
                )
        return content if self.takes_parts else "".join(part["text"] for part in content)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template renders a list of parts, not Python's spelling of the list."""
        message = {"role": "user", "content": [{"type": "text", "text": MARK}]}
        try:
            text = self.apply([message])
        except CannotRender:
            return False
        return MARK in text and "'type'" not in text and '"type"' not in text


def listed(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        raise BadChat(f"expected a list of messages, found {kind(messages)}")
    return messages


def kind(value: Any) -> str:
    names = {type(None): "nothing", str: "text", dict: "an object", list: "a list"}
    return names.get(type(value), type(value).__name__)
