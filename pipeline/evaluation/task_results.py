"""The results of tasks: scores, and what a model kept of its base's right answers."""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import RefusedError
from pipeline.evaluation.measures import Float64s
from pipeline.evaluation.paired import Pairs, paired
from pipeline.types import Json

Answers = dict[str, list[Json]]
"""The answers of one model by task, each as `evaluation.tasks` says."""


def task_results(answers: Answers, base: Answers, metrics: dict[str, str]) -> Json:
    """{"tasks": {name: scores and pairs}, "all_tasks": pairs over all of them}.

    `metrics` names the score of each task that says whether a question is answered.
    """
    found = {
        name: scores(rows, metrics[name])
        | paired(pairs([{name: rows}], {name: base[name]}, metrics))
        for name, rows in answers.items()
    }
    return {"tasks": found, "all_tasks": paired(pairs([answers], base, metrics))}


def scores(rows: list[Json], metric: str) -> Json:
    """Means over the questions: every score, and what a choice by chance would have."""
    names = set.intersection(*(set(row["scores"]) for row in rows))
    choices = [len(row["options"]) for row in rows if len(row.get("options", [])) > 1]
    return {
        "metric": metric,
        "scores": {
            name: float(np.mean([row["scores"][name] for row in rows])) for name in sorted(names)
        },
        "chance": float(np.mean([1 / number for number in choices])) if choices else None,
    }


def pairs(models: Sequence[Answers], base: Answers, metrics: dict[str, str]) -> Pairs:
    """The questions of the tasks that all have answered; those of several models as their mean.

    Raises RefusedError where a model answered other questions than the base.
    """
    names = [name for name in base if all(name in answers for answers in models)]
    for answers in models:
        for name in names:
            if questions(answers[name]) != questions(base[name]):
                raise RefusedError(
                    f"tasks.{name}: the base answered other questions ({len(base[name]):,}) than "
                    f"a model ({len(answers[name]):,}). Both need the same task and limit"
                )
    ours = np.array([flat(answers, names, metrics) for answers in models])
    sizes = [len(base[name]) for name in names]
    return Pairs(ours.mean(0), flat(base, names, metrics), np.repeat(np.arange(len(names)), sizes))


def flat(answers: Answers, names: list[str], metrics: dict[str, str]) -> Float64s:
    rows = [row["scores"][metrics[name]] for name in names for row in answers[name]]
    return np.array(rows, np.float64)


def questions(rows: list[Json]) -> list[tuple[str, int]]:
    return [(row.get("subtask", ""), row["question"]) for row in rows]
