"""The answers of a study's runs: only what is missing is answered, and what arms say together."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TaskConfig
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.study import task_answers
from pipeline.study.task_answers import StudyAnswers

MARKS = {"base": "111100", "ce": "100010", "mol-0": "111000", "mol-1": "110001"}


class FakeTasks:
    """Answers by the name of the model's directory; one question for each mark."""

    def __init__(self, **versions: int) -> None:
        self.versions, self.asked = versions, []

    def __iter__(self) -> Any:
        return iter(self.versions)

    def settings(self, name: str) -> dict[str, Any]:
        return {"version": self.versions[name]}

    def answers(self, name: str, model: str, tokenizer: object) -> list[dict[str, Any]]:
        self.asked.append((model, name))
        return [
            {"task": name, "question": at, "scores": {"acc": int(mark)}}
            for at, mark in enumerate(MARKS[model])
        ]

    def metric(self, name: str, rows: object) -> str:
        return "acc"


@pytest.fixture(autouse=True)
def named_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_answers, "load", lambda folder, dtype: folder.path.name)


def asked(tmp_path: Path, tasks: FakeTasks, names: list[str] | None = None) -> StudyAnswers:
    """Answers of some models after they answered what is missing."""

    class Base:
        tokenizer = None

    found = StudyAnswers(tasks, Base(), "float32")  # type: ignore[arg-type]
    for name in names or list(MARKS):
        (tmp_path / "models" / name).mkdir(parents=True, exist_ok=True)
        found.complete(tmp_path / name, name, ModelFolder(tmp_path / "models" / name))
    return found


def test_only_what_is_missing_is_answered(tmp_path: Path) -> None:
    asked(tmp_path, FakeTasks(one=1), ["base", "ce"])
    more = FakeTasks(one=1, two=1)
    found = asked(tmp_path, more, ["base", "ce"])
    assert more.asked == [("base", "two"), ("ce", "two")]
    changed = FakeTasks(one=2, two=1)
    asked(tmp_path, changed, ["ce"])
    assert changed.asked == [("ce", "one")]
    assert [row["scores"]["acc"] for row in found.read(tmp_path / "base")["two"]] == [1] * 4 + [
        0
    ] * 2


def test_answers_without_their_marker_do_not_count(tmp_path: Path) -> None:
    asked(tmp_path, FakeTasks(one=1), ["ce"])
    (tmp_path / "ce" / "tasks" / "one.json").unlink()  # as if killed before it was written
    again = FakeTasks(one=1)
    assert StudyAnswers(again, None, "float32").read(tmp_path / "ce") is None  # type: ignore[arg-type]
    asked(tmp_path, again, ["ce"])
    assert again.asked == [("ce", "one")]


def test_a_student_that_is_gone_is_named(tmp_path: Path) -> None:
    asked(tmp_path, FakeTasks(one=1), ["base"])
    answers = StudyAnswers(FakeTasks(one=1), None, "float32")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"ce-seed0: its student is to answer one, and .*gone"):
        answers.complete(tmp_path / "ce", "ce-seed0", ModelFolder(tmp_path / "gone"))


def test_runs_and_arms_against_the_base(tmp_path: Path) -> None:
    answers = asked(tmp_path, FakeTasks(one=1))
    base = tmp_path / "base"
    runs = {name: tmp_path / name for name in ("ce", "mol-0", "mol-1")}
    results: dict[str, Any] = {
        "runs": {
            name: {"arm": name.split("-")[0], "learning_rate": 0.1} | answers.measured(run, base)
            for name, run in runs.items()
        },
        "arms": [{"arm": arm, "learning_rate": 0.1} for arm in ("ce", "mol")],
    }
    assert results["runs"]["ce"]["tasks_kept"] == 1 / 4
    assert results["runs"]["mol-1"]["all_tasks"]["won"] == 1
    assert answers.measured(base, base)["tasks_kept"] == 1
    answers.add_arms(results, runs, base)
    ce, mol = results["arms"]
    assert (ce["all_tasks"]["kept"], mol["all_tasks"]["kept"]) == (1, 2.5)
    assert mol["all_tasks"]["won"] == 0.5
    (between,) = results["tasks_between"]
    assert (between["arm"], between["other"]) == ("ce 0.1", "mol 0.1")
    assert between["kept_share"] == pytest.approx((1 - 2.5) / 4)
    json.dumps(results, allow_nan=False)


def test_a_run_that_has_not_answered_has_no_results(tmp_path: Path) -> None:
    answers = asked(tmp_path, FakeTasks(one=1), ["base", "mol-0"])
    assert answers.measured(tmp_path / "ce", tmp_path / "base") == {}
    runs = {name: tmp_path / name for name in ("ce", "mol-0")}
    results: dict[str, Any] = {
        "runs": {name: {"arm": name, "learning_rate": 0.1} for name in runs},
        "arms": [{"arm": name, "learning_rate": 0.1} for name in runs],
    }
    answers.add_arms(results, runs, tmp_path / "base")
    assert ["all_tasks" in arm for arm in results["arms"]] == [False, True]
    assert StudyAnswers(FakeTasks(), None, "float32").measured(tmp_path, tmp_path) == {}  # type: ignore[arg-type]


def test_settings_of_tasks_are_part_of_no_run() -> None:
    """So tasks can be added to a finished study."""
    from pipeline.study import study
    from tests.pipeline.study.test_study import config

    with_tasks = config(tasks={"one": TaskConfig(path="q.jsonl")})
    plain, asking = (object.__new__(study.Study) for _ in range(2))
    plain.config, asking.config = config(), with_tasks
    for mine, other in zip(study.plan(config()), study.plan(with_tasks), strict=True):
        assert plain.settings(mine) == asking.settings(other)
