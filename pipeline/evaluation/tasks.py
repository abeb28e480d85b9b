"""Tasks: what a model answers to questions with known answers, question by question.

Every task runs through lm-evaluation-harness, a file of the user's own as a task that is made here.
An answer is a row of JSON: `task`, `question` (its number in the task), `subtask` for a group of
the harness, `prompt`, `options` with their `logprobs` in nats, `answer` (what the model chose or
wrote), `right` (what it should), and `scores`, each 1 or 0.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import TaskConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.questions import Question, read_questions
from pipeline.file_digests import digest_of
from pipeline.outside import failure
from pipeline.passed import reason
from pipeline.recorded import recorded
from pipeline.types import Json

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

CHOICE: Json = {
    "output_type": "multiple_choice",
    "doc_to_choice": "options",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}
WRITTEN: Json = {
    "output_type": "generate_until",
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": True,
        }
    ],
    "filter_list": [
        {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    ],
}
"""Case, punctuation and white space do not count, as in the harness's own task triviaqa."""
HEADLINE = ("acc", "exact_match")
"""Scores that say whether a question is answered, the first one that a task has."""


class Tasks:
    """The tasks of some settings. Files of questions are read at once."""

    def __init__(self, config: dict[str, TaskConfig], batch_tokens: int) -> None:
        self.config, self.batch_tokens = config, batch_tokens
        self.questions = {
            name: read_questions(task.path, task.limit)
            for name, task in config.items()
            if task.path is not None
        }
        self.harness: Any = import_harness() if config else None

    def __iter__(self) -> Iterator[str]:
        """The names of the tasks."""
        return iter(self.config)

    def settings(self, name: str) -> Json:
        """What decides the answers to a task, beside the model."""
        task = self.config[name]
        kept = {key: value for key, value in recorded(task).items() if key != "metric"}
        content = {} if task.path is None else {"sha256": digest_of(task.path)}
        return {**kept, **content, "harness_version": self.harness.VERSION}

    def answers(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[Json]:
        """The answers of a model that keeps packed sequences apart.

        Raises ConfigError for what the harness cannot do, and where a task has no score that is 1
        or 0 for each question.
        """
        task = self.config[name]
        if task.chat and not tokenizer.chat_template:
            raise ConfigError(
                f"tasks.{name}.chat: the tokenizer has no chat template; leave it out"
            )
        made = self.made(name)
        samples = self.harness.answers(
            self.harness.PackedLM(model, tokenizer, self.batch_tokens),
            made,
            task.limit,
            task.shots,
            task.chat,
        )
        found = [row for part in sorted(samples) for row in rows_of(name, part, samples[part])]
        self.metric(name, found)
        return found

    def made(self, name: str) -> "dict[str, ConfigurableTask]":
        """The task as the harness has it, or those of a group by their names."""
        task = self.config[name]
        if task.path is not None:
            settings = own(name, task, self.questions[name])
            with self.harness.quiet():
                return {name: self.harness.ConfigurableTask(config=settings)}
        try:
            return self.harness.named_task(task.harness, task.folder)
        except Exception as error:  # whatever YAML files, the hub and its data make it raise
            message = f"tasks.{name}: the harness cannot load {task.harness}: {reason(error)}"
            raise failure(message, error) from error

    def metric(self, name: str, answers: list[Json]) -> str:
        """The score that says whether a question of the task is answered."""
        common = set.intersection(*(set(row["scores"]) for row in answers))
        chosen = self.config[name].metric
        wanted = (chosen,) if chosen else (*HEADLINE, *sorted(common))
        found = next((score for score in wanted if score in common), None)
        if found is None:
            raise ConfigError(
                f"tasks.{name}: expected {chosen or 'a score'} of 1 or 0 for each question, found "
                f"{', '.join(sorted(common)) or 'none'}. Set metric, or use another task"
            )
        return found


def import_harness() -> Any:
    try:
        from pipeline.evaluation import harness
    except ImportError as error:
        raise ConfigError(
            f"tasks: need lm-evaluation-harness, which cannot be imported ({error}). Install "
            "mol-distill[tasks]"
        ) from None
    return harness


def own(name: str, task: TaskConfig, questions: list[Question]) -> Json:
    """The harness's settings of a task that is a file of questions.

    Questions get to it as values, so that nothing in them is a template.
    """
    docs = Dataset.from_list([vars(question) for question in questions])

    def prompt(doc: Json) -> str:
        return task.instructions + task.prompt.replace("{question}", doc["question"])

    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": docs},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": prompt,
        "doc_to_target": "answer",
        "metadata": {"version": 0},
        **(CHOICE if questions[0].options else written(task.max_tokens)),
    }


def written(max_tokens: int) -> Json:
    return WRITTEN | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": max_tokens}}


def rows_of(name: str, part: str, samples: list[Json]) -> list[Json]:
    """The answers to one task of the harness, from its samples: one for each filter."""
    filters = {sample["filter"] for sample in samples}
    found: dict[int, Json] = {}
    for sample in samples:
        suffix = f",{sample['filter']}" if len(filters) > 1 else ""
        scores = {
            f"{metric}{suffix}": int(sample[metric])
            for metric in sample["metrics"]
            if np.isscalar(sample[metric]) and sample[metric] in (0, 1)
        }
        row = found.setdefault(
            sample["doc_id"],
            {"task": name, "question": sample["doc_id"]}
            | ({"subtask": part} if part != name else {})
            | content(sample)
            | {"scores": {}},
        )
        row["scores"] |= scores
    return [found[number] for number in sorted(found)]


def content(sample: Json) -> Json:
    """The prompt of a question, what was chosen or written, and what is right."""
    arguments, given = sample["arguments"], sample["filtered_resps"]
    target = sample["target"]
    if isinstance(arguments[0][1], dict):
        return {"prompt": arguments[0][0], "answer": given[0], "right": target}
    options = [continuation for _, continuation in arguments]
    logprobs = [float(logprob) for logprob, _ in given]
    right = target
    if len(options) > 1 and isinstance(target, int):
        right = options[target]
    return {
        "prompt": arguments[0][0],
        "options": options,
        "logprobs": logprobs,
        "answer": options[int(np.argmax(logprobs))],
        "right": right,
    }
