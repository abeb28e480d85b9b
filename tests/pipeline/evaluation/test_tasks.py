"""Tasks: what is refused, what decides the answers, and what is kept of them."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import EvalConfig, TaskConfig
from pipeline.errors import ConfigError
from pipeline.evaluation import tasks as tasks_module
from pipeline.evaluation.tasks import Tasks, rows_of
from pipeline.places import inputs_of
from tests.helpers.questions import write_questions


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either path, a JSONL file with questions, or harness"),
        ({"path": "q.jsonl", "harness": "arc_easy"}, "either path"),
        ({"harness": "mine", "folder": "tasks"}, "can run code.*trust_code: true"),
        ({"path": "q.jsonl", "folder": "tasks", "trust_code": True}, "Name the task with harness"),
        ({"harness": "arc_easy", "instructions": "Answer."}, "has its own"),
        ({"path": "q.jsonl", "prompt": "Q:"}, r"prompt 'Q:': must have {question}"),
    ],
)
def test_settings_that_cannot_work(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskConfig(**given)


def test_the_name_of_a_task_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks: a name becomes part .* found '\.\./x'"):
        EvalConfig({"base": "m"}, tasks={"../x": TaskConfig(path="q.jsonl")})


def test_a_file_of_questions_is_an_input() -> None:
    config = EvalConfig({"base": "m"}, tasks={"one": TaskConfig(path="q.jsonl")})
    assert ("tasks.one.path", "q.jsonl") in list(inputs_of(config))


def test_without_the_harness_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "pipeline.evaluation.harness", raising=False)
    monkeypatch.delattr("pipeline.evaluation.harness", raising=False)
    given = {"one": TaskConfig(path=str(write_questions(tmp_path / "q.jsonl")))}
    with pytest.raises(ConfigError, match=r"tasks: need lm-evaluation-harness.*\[tasks\]"):
        Tasks(given, 64)
    assert Tasks({}, 64).questions == {}


class Fixed:
    """Stands in for the harness's part, which needs a package of its own."""

    VERSION = "1"


@pytest.fixture
def no_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "import_harness", Fixed)


@pytest.mark.usefixtures("no_harness")
def test_settings_change_with_the_file_and_not_with_the_metric(tmp_path: Path) -> None:
    file = write_questions(tmp_path / "q.jsonl")

    def settings(**changes: Any) -> dict[str, Any]:
        return Tasks({"one": TaskConfig(path=str(file), **changes)}, 64).settings("one")

    before = settings()
    assert settings(metric="acc_norm") == before
    assert settings(limit=3) != before
    file.write_text(file.read_text() + file.read_text())
    assert settings() != before


def sample(number: int, name: str = "none", **scores: Any) -> dict[str, Any]:
    return {
        "doc_id": number,
        "filter": name,
        "target": 1,
        "arguments": [("Q", " a"), ("Q", " b")],
        "filtered_resps": [(-2.0, False), (-1.0, True)],
        "metrics": list(scores),
        **scores,
    }


@pytest.mark.usefixtures("no_harness")
def test_rows_hold_the_scores_that_are_one_or_zero(tmp_path: Path) -> None:
    samples = [sample(1, acc=1.0, brier=(1, [0.5])), sample(0, acc=0.0, brier=(1, [0.5]))]
    rows = rows_of("one", "one", samples)
    assert [(row["question"], row["scores"]) for row in rows] == [(0, {"acc": 0}), (1, {"acc": 1})]
    assert (rows[0]["answer"], rows[0]["right"], rows[0]["logprobs"]) == (" b", " b", [-2.0, -1.0])
    assert rows_of("group", "part", samples)[0]["subtask"] == "part"
    several = [sample(0, "strict", exact_match=0), sample(0, "loose", exact_match=1)]
    (row,) = rows_of("one", "one", several)
    assert row["scores"] == {"exact_match,strict": 0, "exact_match,loose": 1}


@pytest.mark.usefixtures("no_harness")
def test_the_metric_is_one_that_every_question_has(tmp_path: Path) -> None:
    path = str(write_questions(tmp_path / "q.jsonl"))
    rows = [{"scores": {"acc": 1, "acc_norm": 0}}, {"scores": {"acc": 1, "acc_norm": 0, "f1": 1}}]

    def metric(name: str | None, rows: list[dict[str, Any]]) -> str:
        return Tasks({"one": TaskConfig(path=path, metric=name)}, 64).metric("one", rows)

    assert metric(None, rows) == "acc"
    assert metric("acc_norm", rows) == "acc_norm"
    assert metric(None, [{"scores": {"exact_match,loose": 1}}]) == "exact_match,loose"
    with pytest.raises(ConfigError, match=r"tasks\.one: expected f1 .* found acc, acc_norm"):
        metric("f1", rows)
    with pytest.raises(ConfigError, match=r"expected a score of 1 or 0 .* found none"):
        metric(None, [{"scores": {}}])
