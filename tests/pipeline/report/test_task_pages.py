"""What the pages of an evaluation and of a study say of tasks."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.paired import difference
from pipeline.evaluation.task_results import pairs, task_results
from pipeline.report import report, task_parts

METRICS = {"one": "acc"}


def answers(marks: str) -> dict[str, list[dict[str, Any]]]:
    rows = [
        {
            "task": "one", "question": at, "prompt": f"<b>{at}?", "options": [" a", " b"],
            "answer": " a", "right": " b", "scores": {"acc": int(mark)},
        }
        for at, mark in enumerate(marks)
    ]  # fmt: skip
    return {"one": rows}


BASE = answers("111100")
STUDENT = answers("110010")


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    given = {"student": STUDENT, "base": BASE}
    models = {name: task_results(rows, BASE, METRICS) for name, rows in given.items()}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"base": "base", "models": models}))
    lines = [{"model": name} | row for name, rows in given.items() for row in rows["one"]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "results.answers.jsonl").write_text(text)
    return file


def test_an_evaluation_begins_with_what_was_kept(evaluation: Path) -> None:
    for path in (evaluation, evaluation.parent):
        text, kind = report.make(str(path))
        assert kind == "evaluation"
        assert "<p>student kept 2 of the 4 questions that base answered (50%;" in text
    assert "student: questions lost, 2 in all" in text
    assert "one, question 2" in text
    assert "one, question 3" in text
    assert "one, question 4" not in text
    assert "&lt;b&gt;3?" in text
    assert "Held-out text" not in text


def test_an_evaluation_of_text_alone_has_a_page(evaluation: Path) -> None:
    measured = {
        "tokens": 1234, "perplexity": 9.5, "forward_kl": 0.25, "reverse_kl": "NaN",
        "documents": 3, "documents_worse": 1,
    }  # fmt: skip
    models = {name: {"general": measured, "kl_to_base": 0.25} for name in ("student", "base")}
    evaluation.write_text(json.dumps({"base": "base", "models": models}))
    text, _ = report.make(str(evaluation))
    assert "<p>On general text student is 0.2500 nats per token from base" in text
    assert "<td>1,234</td><td>9.50</td><td>0.2500</td><td>nan</td>" in text
    assert "Tasks" not in text


def test_the_results_are_not_written_over(evaluation: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output .* lies in the evaluation"):
        report.run(str(evaluation), str(evaluation))
    assert json.loads(evaluation.read_text())["base"] == "base"


def test_a_study_says_what_its_arms_kept() -> None:
    arms = {"ce": STUDENT, "mol": answers("111000")}
    measured = {name: task_results(rows, BASE, METRICS) for name, rows in arms.items()}
    both = [pairs([rows], BASE, METRICS) for rows in arms.values()]
    results = {
        "base": task_results(BASE, BASE, METRICS),
        "arms": [
            {"arm": name, "learning_rate": 0.1, "all_tasks": of["all_tasks"]}
            for name, of in measured.items()
        ],
        "runs": {f"{name}-seed0": of for name, of in measured.items()},
        "tasks_between": [{"arm": "ce", "other": "mol"} | difference(*both)],
    }
    said = task_parts.said(results)
    assert said.startswith("mol kept 3 of the 4 questions that the base answered (75%;")
    assert "ce kept 2 of the 4" in said
    text = "".join(task_parts.of_arms(results))
    assert "<td>ce</td><td>mol</td><td>-25.0%</td>" in text
    assert "mol-seed0" in text
    assert task_parts.of_arms({"base": {}, "arms": [], "runs": {}}) == []
    assert task_parts.said({"arms": []}) == ""
