"""Which characters of a rendered chat are learnt.

The template's own generation markers say what the assistant writes, where it has them. Otherwise
the chat is rendered turn by turn, as it was when the assistant had to answer: a turn begins where
the messages before it, with the generation prompt, end, and it ends where the messages with it end.
Both must be beginnings of the whole chat, or the template does not show where the turn is.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.chat_process import same_start
from pipeline.chat_renderer import Beginning, CannotRender, Part, Rendering
from pipeline.spans import Span
from pipeline.types import Json

MARKER = "endgeneration"
LINE = 100  # characters of a line that is shown
ADVICE = (
    "Put {% generation %} and {% endgeneration %} around the assistant's text in the template, "
    "outside of macros, or make a document of each reply, with prompt_column and completion_column"
)


class CannotTell(ValueError):
    """The template does not show where a turn begins or ends."""


@dataclass
class Turns:
    """A chat, and how to render beginnings of it."""

    messages: list[Json]
    render: Callable[[list[Beginning]], Rendering]
    special: re.Pattern[str]
    """Matches each special token."""

    def assistant(self) -> tuple[str, list[Span]]:
        """(text, the turns of the assistant). Raises CannotTell, and CannotRender."""
        roles = [message["role"] for message in self.messages]
        return self.places([(at, at + 1) for at, role in enumerate(roles) if role == "assistant"])

    def after(self, number: int) -> tuple[str, list[Span]]:
        """(text, all that follows the first messages). Raises CannotTell, and CannotRender."""
        last = len(self.messages)
        return self.places([(number, last)] if number < last else [])

    def places(self, turns: list[tuple[int, int]]) -> tuple[str, list[Span]]:
        """(text, where messages first to last - 1 are, for each turn)."""
        stops = [(last, last == len(self.messages)) for _, last in turns]
        found = self.render([*(self.prompt(first) for first, _ in turns), *stops])
        self.text, self.parts = found.text, found.parts
        differ = [
            last for last, prompted in stops if not prompted and self.part((last, False)).rest
        ]
        if differ:
            self.parts |= self.render([(last, True) for last in differ]).parts
        spans: list[Span] = []
        for first, last in turns:
            start = self.start(first)
            if spans and start < spans[-1][1]:
                raise self.cannot_tell(f"where message {first} begins")
            stop = self.stop(first, last, start)
            if stop < start:
                raise self.cannot_tell(f"where message {first} is")
            spans.append((start, stop))
        return self.text, ending(self.text, spans, self.special)

    def prompt(self, first: int) -> Beginning:
        """What was rendered when message `first` had to be written."""
        return first, self.messages[first]["role"] == "assistant"

    def part(self, beginning: Beginning) -> Part:
        found = self.parts[beginning]
        if isinstance(found, CannotRender):
            raise CannotRender(f"(the first {beginning[0]} messages alone) {found}")
        return found

    def start(self, first: int) -> int:
        part = self.part(self.prompt(first))
        if part.rest:
            raise self.cannot_tell(f"where message {first} begins", part)
        return part.same

    def stop(self, first: int, last: int, start: int) -> int:
        if last == len(self.messages):
            return self.last_stop(start)
        part = self.part((last, False))
        if not part.rest:
            return part.same
        own = self.without_end(self.text[: part.same] + part.rest, last)
        if self.text.startswith(own) and len(own) > start:
            return len(own)
        if part.same >= start:
            found = shortened(own[start:], self.text[start:], self.special)
            if found:
                return start + found
        raise self.cannot_tell(f"where message {first} ends", part)

    def last_stop(self, start: int) -> int:
        """Without what the template writes at the end of every chat, if the turn has an end."""
        own = self.without_end(self.text, len(self.messages))
        return len(own) if last_token(own[start:], self.special) else len(self.text)

    def without_end(self, text: str, number: int) -> str:
        """The rendering of the first messages as far as a generation prompt does not change it:
        some templates write an end-of-text token where none follows."""
        try:
            part = self.part((number, True))
        except CannotRender:  # not after the assistant's own message
            return text
        return common(text, self.text[: part.same] + part.rest, self.special)

    def cannot_tell(self, what: str, part: Part | None = None) -> CannotTell:
        lines = ""
        if part is not None:
            alone = line_of(self.text[: part.same] + part.rest, part.same)
            whole = line_of(self.text, part.same)
            lines = f": the messages up to there are rendered as {alone!r}, in the whole chat as "
            lines += repr(whole)
        return CannotTell(f"does not show {what}{lines}. {ADVICE}")


def ending(text: str, spans: Iterable[Span], special: re.Pattern[str]) -> list[Span]:
    """The spans without white space behind their last special token: no model writes that."""
    last = [last_token(text[start:stop], special) for start, stop in spans]
    return [
        (start, start + token.end() if token else stop)
        for (start, stop), token in zip(spans, last, strict=True)
    ]


def last_token(text: str, special: re.Pattern[str]) -> re.Match[str] | None:
    """The special token that ends a text, but for white space."""
    found = list(special.finditer(text))
    return found[-1] if found and not text[found[-1].end() :].strip() else None


def common(one: str, other: str, special: re.Pattern[str]) -> str:
    """What both texts begin with, in whole special tokens."""
    same = same_start(one, other)
    for match in special.finditer(one):
        if match.start() < same < match.end():
            same = match.start()
    return one[:same]


def shortened(own: str, text: str, special: re.Pattern[str]) -> int:
    """Length of the turn that a text begins with, where the template leaves out its beginning.

    Templates drop the reasoning of earlier turns. What is left of a turn is an end of `own`, which
    is the turn before that, and it ends with the turn's special token. So a beginning of the text
    that is an end of `own` is the turn, if it is the only one. 0 where there is none, or several.
    """
    last = last_token(own, special)
    if last is None:
        return 0
    tail = own[last.start() :]
    ends = [found.end() for found in re.finditer(re.escape(tail), text[: len(own)])]
    turns = [end for end in ends if own.endswith(text[:end])]
    return turns[0] if len(turns) == 1 else 0


def line_of(text: str, at: int) -> str:
    """The line of a text around a character."""
    start = text.rfind("\n", 0, at) + 1
    stop = text.find("\n", at)
    return text[max(start, at - LINE // 2) : stop if stop >= 0 else len(text)][:LINE]
