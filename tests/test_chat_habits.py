"""The checks of scripts/studies/chat_habits.py, and that questions are not among the prompts."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def study() -> Any:
    spec = importlib.util.spec_from_file_location(
        "chat_habits", ROOT / "scripts" / "studies" / "chat_habits.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_questions_are_about_other_topics(study: Any, tmp_path: Path) -> None:
    study.main("prompts", str(tmp_path / "data"))
    prompts, questions = (
        [json.loads(line) for line in (tmp_path / "data" / name).read_text().splitlines()]
        for name in ("prompts.jsonl", "questions.jsonl")
    )
    assert (len(prompts), len(questions)) == (200, 100)
    asked = {each["messages"][0]["content"] for each in prompts + questions}
    assert len(asked) == 300
    assert set(study.TOPICS.split(",")).isdisjoint(study.OTHERS.split(","))


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("word", ["Yes", "no.", "**Yes**"], ["Yes, it is", "maybe", ""]),
        ("sentence", ["A train moves."], ["A train moves. It is long.", "A train\nmoves.", "A"]),
        ("numbers", ["1. a\n2. b\n\n3. c"], ["1. a\n2. b", "Facts:\n1. a\n2. b\n3. c", "a"]),
        ("bullets", ["- a\n- b", "* a\n* b"], ["- a", "Uses:\n- a\n- b", "a\nb"]),
        (
            "json",
            ['{"name": "a", "description": "b"}', '```json\n{"Name": 1, "Description": 2}\n```'],
            ['{"name": "a"}', "name: a", '["name", "description"]'],
        ),
    ],
)
def test_forms(study: Any, form: str, good: list[str], bad: list[str]) -> None:
    assert all(map(study.CHECKS[form], good))
    assert not any(map(study.CHECKS[form], bad))
