"""Chat messages -> text, by the tokenizer's chat template."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.chat_renderer import RENDERER, Beginning, CannotRender, Rendering
from pipeline.chat_targets import MARKER, CannotTell, Turns, ending
from pipeline.config import Targets
from pipeline.spans import Span, Text
from pipeline.special_tokens import CannotMask, SpecialTokens, pattern_of, special_ids
from pipeline.types import Json

TODAY = datetime(2024, 7, 26)
"""What a template's clock shows, always: rows must not depend on the day they were rendered on.
Templates of Llama 3.2 take this date where there is no clock."""
WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
MARK = "a part of text"
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
}
"""Names of ShareGPT's `from` for the roles of messages; other names are roles themselves."""


class BadChat(ValueError):
    """Messages that cannot be rendered. The message says why, but not where they are."""


@dataclass(frozen=True)
class Chat:
    messages: list[Json]
    tools: list[Json] | None
    spelled: Mapping[str, str] = field(default_factory=dict)
    """The special token that each masking character in them stands for."""


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
            self.with_tools = str(tokenizer.get_chat_template(tools=[]))
        except ValueError as error:
            raise BadChat(str(error).splitlines()[0]) from None

    def identity(self) -> Json:
        """What decides the text beside the messages: the template, and the date if it asks."""
        found = {"fingerprint": hashlib.sha256(self.source.encode()).hexdigest()}
        if self.with_tools != self.source:  # of chats that have tools
            found["with_tools"] = hashlib.sha256(self.with_tools.encode()).hexdigest()
        return found | ({"date": f"{TODAY:%Y-%m-%d}"} if asks_time(self.source) else {})

    def render(
        self, messages: Any, tools: Any = None, targets: Targets = "all", prompt: int = 0
    ) -> Text:
        """A chat as text, with the characters that are learnt; empty for no messages.

        `assistant` learns the assistant's turns, `completion` what follows the first `prompt`
        messages. Raises BadChat, also where the template takes more time or memory than it may
        (chat_renderer.py), and where it does not show which characters these are.
        """
        chat = self.checked(messages, tools)
        if not chat.messages:
            return Text()
        with self.named():
            text, spans = self.learnt(chat, targets, prompt)
            text.encode()
        return Text.of(text, spans, chat.spelled)

    def prompt(self, messages: Any, tools: Any = None) -> Text:
        """A chat as text with the generation prompt behind it. Raises BadChat."""
        chat = self.checked(messages, tools)
        with self.named():
            whole = (len(chat.messages), True)
            rendering = self.rendering(chat, [whole])
            part = rendering.parts[whole]
            if isinstance(part, CannotRender):
                raise part
            text = rendering.text[: part.same] + part.rest
            text.encode()
        return Text.of(text, spelled=chat.spelled)

    @contextmanager
    def named(self) -> Iterator[None]:
        """What goes wrong becomes a BadChat that names the template's model."""
        name = f"the chat template of {self.tokenizer.name_or_path}"
        try:
            yield
        except CannotTell as error:
            raise BadChat(f"{name} {error}") from error
        except (CannotRender, CannotMask, UnicodeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadChat(f"{name} cannot render it: {reason}") from error

    def checked(self, messages: Any, tools: Any) -> Chat:
        found = [self.message(each, f"message {at}") for at, each in enumerate(listed(messages))]
        tools = tools_of(tools)
        if self.special is None:
            return Chat(found, tools)
        with self.named():
            masked, spelled = self.special.mask([found, tools], self.source + self.with_tools)
        return Chat(masked[0], masked[1], spelled)

    def learnt(self, chat: Chat, targets: Targets, prompt: int) -> tuple[str, list[Span] | None]:
        """(text, the characters that are learnt; None for all)."""
        if targets == "all":
            return self.rendering(chat).text, None
        turns = Turns(chat.messages, partial(self.rendering, chat), self.ends)
        if targets == "completion":
            return turns.after(prompt)
        if MARKER in self.template_of(chat)["source"]:
            found = self.rendering(chat, marked=True)
            if found.marks is not None:
                return found.text, ending(found.text, found.marks, self.ends)
        return turns.assistant()

    def rendering(
        self, chat: Chat, beginnings: Sequence[Beginning] = (), marked: bool = False
    ) -> Rendering:
        template = self.template_of(chat)
        found = RENDERER.render(template, chat.messages, chat.tools, beginnings, marked)
        if any(f"\\u{ord(mask):04x}" in found.text for mask in chat.spelled):
            raise CannotMask("the template escapes characters, and a message spells special tokens")
        return found

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """Matches the special tokens, one of which ends a turn in most templates."""
        return pattern_of(special_ids(self.tokenizer))

    def template_of(self, chat: Chat) -> Json:
        """What apply_chat_template gives to jinja beside the messages. Some tokenizers have a
        template of its own for chats with tools."""
        return self.templates[chat.tools is not None]

    @cached_property
    def templates(self) -> tuple[Json, Json]:
        given = dict(self.tokenizer.special_tokens_map)
        default, with_tools = (
            {
                "source": source,
                "given": given,
                "now": TODAY.isoformat() if asks_time(source) else None,
            }
            for source in (self.source, self.with_tools)
        )
        return default, with_tools

    def message(self, message: Any, place: str) -> Json:
        """A message without its null keys, which are as good as absent."""
        if not isinstance(message, dict):
            raise BadChat(
                f"{place}: expected an object with role and content, found {kind(message)}"
            )
        message = {key: value for key, value in message.items() if value is not None}
        if "role" not in message and "from" in message:
            message = as_message(message)
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
            text = RENDERER.render(self.templates[0], [message]).text
        except CannotRender:
            return False
        return MARK in text and "'type'" not in text and '"type"' not in text


def asks_time(source: str) -> bool:
    """Whether a template asks for the time; it gets a clock that stands still."""
    return "strftime_now" in source


def as_message(turn: Json) -> Json:
    """A turn of ShareGPT, which has from and value."""
    message = {name: value for name, value in turn.items() if name not in ("from", "value")}
    role = turn["from"]
    message["role"] = ROLES.get(role, role) if isinstance(role, str) else role
    return message | ({"content": turn["value"]} if "value" in turn else {})


def listed(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        raise BadChat(f"expected a list of messages, found {kind(messages)}")
    return messages


def tools_of(tools: Any) -> list[Json] | None:
    """The tools of a chat, which many corpora hold as the text of their JSON; None for none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except (ValueError, RecursionError):
            raise BadChat("tools: expected a list of objects, found text that is no JSON") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        found = kind(tools) if not isinstance(tools, list) else "a list with other values"
        raise BadChat(f"tools: expected a list of objects, found {found}")
    return tools


def kind(value: Any) -> str:
    names = {type(None): "nothing", str: "text", dict: "an object", list: "a list"}
    return names.get(type(value), type(value).__name__)
