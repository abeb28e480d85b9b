"""Questions with known answers, on disk for the tests."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.corpora import write_jsonl
from tests.helpers.models import TEXTS

WORDS = sorted({word for text in TEXTS[:3] for word in text.split() if word.isalpha()})


def some_questions(number: int) -> list[dict[str, Any]]:
    """Questions of 2 to 5 options with 1 to 3 words; templates and braces are in some of them."""
    found = []
    for at in range(number):
        words = [WORDS[(7 * at + 11 * each) % len(WORDS)] for each in range(15)]
        options = [" ".join(words[3 * n : 3 * n + 1 + (at + n) % 3]) for n in range(2 + at % 4)]
        text = f"{TEXTS[at % len(TEXTS)][: 20 + 31 * (at % 5)]}{{{{ {at} }}}} {{% {at} %}}"
        right = at % len(options)
        answer = options[right] if at % 2 else right
        found.append({"question": text, "options": options, "answer": answer})
    return found


def write_questions(path: Path, number: int = 12) -> Path:
    return write_jsonl(path, some_questions(number))


def write_written(path: Path, answers: list[Any]) -> Path:
    """Questions without options, with these right answers."""
    asked = some_questions(len(answers))
    rows = [
        {"question": each["question"], "answer": answer}
        for each, answer in zip(asked, answers, strict=True)
    ]
    return write_jsonl(path, rows)


def task_folder(path: Path, questions: Path, name: str = "local_task") -> Path:
    """A task of lm-evaluation-harness as its users write them: a YAML file and its data."""
    path.mkdir()
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for row in rows:
        if isinstance(row["answer"], str):
            row["answer"] = row["options"].index(row["answer"])
    write_jsonl(path / "data.jsonl", rows)
    (path / f"{name}.yaml").write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {path / 'data.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        "doc_to_choice: options\n"
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return path
