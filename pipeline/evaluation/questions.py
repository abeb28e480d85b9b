"""Questions with known answers, from a JSONL file of the user's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.corpus_files import format_of
from pipeline.corpus_readers import Source, json_rows
from pipeline.errors import ConfigError

FORM = '{"question": "2 + 2 =", "options": ["3", "4"], "answer": 1}'


@dataclass(frozen=True)
class Question:
    """A question, and what answers it rightly."""

    question: str
    options: list[str]
    """What may be answered; empty where the answer is written."""
    answer: int | list[str]
    """Number of the right option, from 0; without options, the texts that are right."""


class QuestionFile(Source):
    """A file of questions, read like a corpus in JSON."""

    def wrong(self, what: str, place: str = "") -> ConfigError:
        where = f"{self.name}, {place}" if place else self.name
        return ConfigError(f"questions {where}: {what}")

    def text(self, value: Any, place: str, what: str) -> str:
        """A text that is not empty, and that UTF-8 can hold."""
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{what}: expected text, found {shown(value)}", place)
        self.check(value, place)
        return value

    def texts(self, value: Any, place: str, what: str, least: int) -> list[str]:
        """Different texts, at least `least`."""
        if not isinstance(value, list) or len(value) < least:
            raise self.wrong(
                f"{what}: expected a list of {least} texts or more, found {shown(value)}", place
            )
        found = [self.text(part, place, what) for part in value]
        again = next((part for at, part in enumerate(found) if part in found[:at]), None)
        if again is not None:
            raise self.wrong(f"{what}: {shown(again)} is there twice; remove one", place)
        return found

    def question(self, row: dict[str, Any], place: str) -> Question:
        """The question of a row; ConfigError for one that no answer can be right for."""
        question = self.text(row.get("question"), place, "question")
        answer = row.get("answer")
        if row.get("options") is None:
            several = answer if isinstance(answer, list) else [answer]
            return Question(question, [], self.texts(several, place, "answer", 1))
        options = self.texts(row["options"], place, "options", 2)
        if isinstance(answer, str) and answer in options:
            return Question(question, options, options.index(answer))
        if type(answer) is not int or not 0 <= answer < len(options):  # true is an int, too
            raise self.wrong(
                f"answer: expected the text of an option, or its number from 0 to "
                f"{len(options) - 1}, found {shown(answer)}",
                place,
            )
        return Question(question, options, answer)


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """The first questions of a file, at most `limit`; all have options, or none.

    Raises ConfigError, with the line, for what is no question.
    """
    file = QuestionFile(path, str(Path(path).expanduser()), "question")
    if format_of(path) != "json":
        raise file.wrong(f"expected a JSONL file (.jsonl, .json, also .gz and .zst), lines {FORM}")
    found: list[Question] = []
    for place, _, row in json_rows(file):
        question = file.question(row, place)
        if found and bool(found[0].options) != bool(question.options):
            has, lacks = ("options", "none") if question.options else ("no options", "some")
            raise file.wrong(
                f"has {has}, and the first question has {lacks}. Make a task of each kind", place
            )
        found.append(question)
        if len(found) == limit:
            break
    if not found:
        raise file.wrong(f"no question is in it; expected lines like {FORM}")
    return found


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
