"""Files of questions: what is read, and what is refused with its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.questions import Question, read_questions
from tests.helpers.corpora import write_jsonl

GOOD = {"question": "2 + 2 =", "options": ["3", "4"], "answer": 1}


def test_an_answer_is_a_number_or_a_text(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"answer": "3"}, GOOD | {"options": ["1", "0"], "answer": 1}]
    expected = [Question("2 + 2 =", ["3", "4"], n) for n in (1, 0)]
    expected.append(Question("2 + 2 =", ["1", "0"], 1))  # the number of an option, not its text
    assert read_questions(str(write_jsonl(tmp_path / "q.jsonl", rows))) == expected
    assert read_questions(str(tmp_path / "q.jsonl"), 1) == expected[:1]


def test_without_options_the_answer_is_text(tmp_path: Path) -> None:
    rows = [{"question": "a?", "answer": "b"}, {"question": "a?", "answer": ["b", "c"]}]
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)) + "\n\n")
    found = read_questions(str(tmp_path / "q.jsonl.gz"))
    assert [question.answer for question in found] == [["b"], ["b", "c"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, "answer: expected .* from 0 to 1, found 2"),
        ({"answer": -1}, "found -1"),
        ({"answer": True}, "found True"),
        ({"answer": "5"}, "answer: expected the text of an option"),
        ({"answer": None}, "found None"),
        ({"answer": 1.0}, r"found 1\.0"),
        ({"answer": [1]}, r"found \[1\]"),
        ({"question": " \n"}, "question: expected text"),
        ({"question": 7}, "question: expected text, found 7"),
        ({"question": "a\ud800"}, "half a character"),
        ({"options": ["4"]}, "options: expected a list of 2 texts or more"),
        ({"options": "yes no"}, "options: expected a list"),
        ({"options": ["3", "4", "3"]}, "'3' is there twice"),
        ({"options": ["3", ""]}, "options: expected text, found ''"),
        ({"options": ["3", 4]}, "options: expected text, found 4"),
        ({"options": None, "answer": "4"}, "has no options, and the first question has some"),
        ({"options": None, "answer": []}, "answer: expected a list of 1 texts or more"),
        ({"options": None, "answer": 4}, "answer: expected text, found 4"),
    ],
)
def test_what_is_no_question_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", [GOOD, GOOD | changes])
    with pytest.raises(ConfigError, match=r"questions .*q\.jsonl, line 2: ") as caught:
        read_questions(str(file))
    caught.match(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", "", "no question is in it"),
        ("q.jsonl", '{"question": "a', r"line 1: not JSON"),
        ("q.jsonl", "[1]", "expected a JSON object, found list"),
        ("q.txt", "a", "expected a JSONL file"),
        ("q.csv", "a", "expected a JSONL file"),
    ],
)
def test_a_file_without_questions_is_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_questions(str(tmp_path / name))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: cannot be read: .*No such file"):
        read_questions(str(tmp_path / "none.jsonl"))
