"""What a page says of tasks: which of the base's right answers were kept."""

from typing import Any

from pipeline.evaluation.task_table import HEAD, in_words, line, lines
from pipeline.report.html import heading, note, table
from pipeline.types import Json

COLUMNS = (
    "Kept: the base and the model are right. Lost: only the base. Won: only the model. Change: of "
    "the share of right answers. p: McNemar's exact test. 95 %: bootstrap over questions."
)
LARGEST = 15  # pairs of arms that are shown


def of_models(report: Json) -> list[str]:
    """An evaluation's tasks, model by model; empty where it has none."""
    if not report["models"][report["base"]].get("tasks"):
        return []
    return [heading("Tasks"), table(list(HEAD), lines(report)), note(COLUMNS)]


def of_arms(results: Json) -> list[str]:
    """A study's tasks, arm by arm and run by run; empty where it has none."""
    if not results["base"].get("all_tasks"):
        return []
    base, name = results["base"], "base"
    rows = [["all tasks", *line(name, base["all_tasks"], True)]]
    rows += [
        ["all tasks", *line(f"{of['arm']} {of['learning_rate']:g}", of["all_tasks"], False)]
        for of in results["arms"]
        if "all_tasks" in of
    ]
    answered = {run: of for run, of in results["runs"].items() if "tasks" in of}
    by_run = {"base": "base", "models": {"base": base, **answered}}
    return [
        heading("Tasks"),
        table(list(HEAD), rows),
        note(f"Means over the seeds. {COLUMNS}"),
        *between(results.get("tasks_between", [])),
        heading("Tasks of each run", 3),
        table(list(HEAD), lines(by_run)),
    ]


def between(found: list[Json]) -> list[str]:
    """The pairs of arms whose kept shares differ most surely."""
    known = [of for of in found if of["kept_share"] is not None]
    known.sort(key=lambda of: -sureness(of))
    rows: list[list[Any]] = [
        [
            of["arm"],
            of["other"],
            f"{of['kept_share']:+.1%}",
            "{:+.1%} to {:+.1%}".format(*of["interval"]),
        ]
        for of in known[:LARGEST]
    ]
    head = ["arm", "against", "keeps more by", "95 %"]
    return [heading("Which arm keeps more", 3), table(head, rows)] if rows else []


def sureness(of: Json) -> float:
    """How many half widths of its interval a difference is from 0."""
    low, high = of["interval"]
    return abs(of["kept_share"]) / max(1e-9, (high - low) / 2)


def said(results: Json) -> str:
    """What the arms of a study kept, the best and the worst; empty without tasks."""
    arms = [of for of in results["arms"] if (of.get("all_tasks") or {}).get("base_right")]
    if not arms:
        return ""
    arms.sort(key=lambda of: -of["all_tasks"]["kept_share"])
    chosen = arms if len(arms) < 3 else [arms[0], arms[-1]]
    return " ".join(in_words(of["arm"], "the base", of["all_tasks"]) for of in chosen)
