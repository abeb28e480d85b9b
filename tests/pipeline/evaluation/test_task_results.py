"""The results of tasks: which questions are compared, and how it is said."""

from typing import Any

import pytest

from pipeline.errors import RefusedError
from pipeline.evaluation.task_results import pairs, task_results
from pipeline.evaluation.task_table import in_words, table


def answers(**tasks: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of answers; each task is a word of 1 and 0."""
    return {
        name: [
            {"question": at, "options": ["a", "b"], "scores": {"acc": int(mark), "acc_norm": 1}}
            for at, mark in enumerate(marks)
        ]
        for name, marks in tasks.items()
    }


METRICS = {"one": "acc", "two": "acc"}
BASE = answers(one="1100", two="11111")


def report() -> dict[str, Any]:
    models = {"student": answers(one="1010", two="11110"), "base": BASE}
    return {
        "base": "base",
        "models": {name: task_results(rows, BASE, METRICS) for name, rows in models.items()},
    }


def test_results_by_task_and_over_all() -> None:
    student = report()["models"]["student"]
    one, both = student["tasks"]["one"], student["all_tasks"]
    assert (one["kept"], one["lost"], one["won"], one["questions"]) == (1, 1, 1, 4)
    assert one["scores"] == {"acc": 0.5, "acc_norm": 1.0}
    assert (one["metric"], one["chance"]) == ("acc", 0.5)
    assert (both["kept"], both["base_right"], both["lost"], both["won"]) == (5, 7, 2, 1)


def test_words_say_what_was_kept() -> None:
    said = in_words("student", "the base", report()["models"]["student"]["all_tasks"])
    assert said.startswith("student kept 5 of the 7 questions that the base answered (71%; 95 %")
    assert said.endswith("It lost 2 and won 1 others, of 9 in all, p = 1.")
    none = task_results(answers(one="1"), answers(one="0"), METRICS)["all_tasks"]
    assert in_words("s", "base", none) == (
        "base answered none of the 1 questions, so s had none to keep."
    )


def test_the_table_has_a_line_per_task_and_model() -> None:
    lines = table(report()).splitlines()
    assert [line.split()[:2] for line in lines[5:]] == [
        ["one", "base"], ["one", "student"], ["two", "base"], ["two", "student"],
        ["all", "tasks"], ["all", "tasks"],
    ]  # fmt: skip
    assert "1 of 2" in lines[6]


def test_other_questions_cannot_be_compared() -> None:
    with pytest.raises(
        RefusedError, match=r"tasks\.one: .*other questions \(4\) than a model \(3\)"
    ):
        pairs([answers(one="110", two="11111")], BASE, METRICS)


def test_several_models_are_their_mean() -> None:
    found = pairs(
        [answers(one="1000", two="11111"), answers(one="0000", two="11111")], BASE, METRICS
    )
    assert found.model.tolist() == [0.5, 0, 0, 0, 1, 1, 1, 1, 1]
    assert found.groups.tolist() == [0] * 4 + [1] * 5
