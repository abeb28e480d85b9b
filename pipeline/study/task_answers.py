"""The answers of a study's students to its tasks, kept in each run, and what they say together.

A run has a file of answers for each task, tasks/NAME.jsonl, and beside it NAME.json with what
decided them, which is written last. So tasks can be added to a finished study, or changed: each
student answers what is missing.
"""

from itertools import combinations
from math import nan
from pathlib import Path

from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.evaluation.compare import load
from pipeline.evaluation.paired import difference, paired
from pipeline.evaluation.task_results import Answers, pairs, task_results
from pipeline.evaluation.tasks import Tasks
from pipeline.json_files import read_lines, read_object, write_json, write_lines
from pipeline.models.directory import ModelFolder
from pipeline.progress import say
from pipeline.types import Json

FOLDER = "tasks"


class StudyAnswers:
    """Reads and completes the answers of runs."""

    def __init__(self, tasks: Tasks, base: ModelFolder, dtype: str) -> None:
        self.tasks, self.base, self.dtype = tasks, base, dtype
        self.settings = {name: tasks.settings(name) | {"dtype": dtype} for name in tasks}

    def missing(self, run: Path) -> list[str]:
        """The tasks that a run has not answered with these settings."""
        return [
            name
            for name, settings in self.settings.items()
            if read_object(run / FOLDER / f"{name}.json") != settings
        ]

    def complete(self, run: Path, name: str, folder: ModelFolder) -> None:
        """Let the model of a run answer what is missing.

        Raises ConfigError where the model is not there any more.
        """
        missing = self.missing(run)
        if not missing:
            return
        if not folder.path.exists():
            raise ConfigError(
                f"{name}: its student is to answer {', '.join(missing)}, and {folder} is not "
                "there. Restore it, or leave these tasks out"
            )
        model: PreTrainedModel = load(folder, self.dtype)
        for task in missing:
            say(f"{name}: {task}")
            rows = self.tasks.answers(task, model, self.base.tokenizer)
            marker = run / FOLDER / f"{task}.json"
            marker.unlink(missing_ok=True)
            write_lines(marker.with_suffix(".jsonl"), rows)
            write_json(marker, self.settings[task])

    def read(self, run: Path) -> Answers | None:
        """The answers of a run by task; None where some are missing."""
        if self.missing(run):
            return None
        return {name: read_lines(run / FOLDER / f"{name}.jsonl") for name in self.tasks}

    def measured(self, run: Path, base: Path) -> Json:
        """A run's `task_results` against the base, and its headline; nothing where some are
        missing."""
        ours, theirs = self.read(run), self.read(base)
        if ours is None or theirs is None or not theirs:
            return {}
        found = task_results(ours, theirs, self.metrics(theirs))
        both = found["all_tasks"]
        return found | {
            "tasks_right": both["right"] / both["questions"],
            "tasks_kept": nan if both["kept_share"] is None else both["kept_share"],
        }

    def metrics(self, answers: Answers) -> dict[str, str]:
        return {name: self.tasks.metric(name, rows) for name, rows in answers.items()}

    def add_arms(self, results: Json, runs: dict[str, Path], base: Path) -> None:
        """Add to each arm the pairs of its seeds' mean, and for any two arms by how much one keeps
        more."""
        theirs = self.read(base)
        if not theirs:
            return
        metrics, arms = self.metrics(theirs), {}
        for arm in results["arms"]:
            members = [self.read(runs[name]) for name in runs_of(results, arm)]
            answered = [rows for rows in members if rows is not None]
            if len(answered) < len(members):
                continue
            both = pairs(answered, theirs, metrics)
            arm["all_tasks"] = paired(both)
            arms[f"{arm['arm']} {arm['learning_rate']:g}"] = both
        results["tasks_between"] = [
            {"arm": one, "other": other} | difference(arms[one], arms[other])
            for one, other in combinations(arms, 2)
        ]


def runs_of(results: Json, arm: Json) -> list[str]:
    """The names of an arm's runs, its seeds at one learning rate."""
    return [
        name
        for name, one in results["runs"].items()
        if (one["arm"], one["learning_rate"]) == (arm["arm"], arm["learning_rate"])
    ]
