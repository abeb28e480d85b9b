"""The page about an evaluation: each model against its base, on text and on tasks."""

from pathlib import Path

from pipeline.config import KINDS
from pipeline.evaluation.task_table import in_words as tasks_in_words
from pipeline.json_files import read_json, read_lines
from pipeline.report import task_parts
from pipeline.report.html import heading, lead, note, page, quote, table
from pipeline.types import Json

SHOWN = 10  # questions of each model that it lost
LONGEST = 600  # characters of one


def report(file: Path) -> str:
    results = read_json(file)
    answers = file.with_name(f"{file.stem}.answers.jsonl")
    return page(
        f"Evaluation {file}",
        [
            lead(in_words(results)),
            *task_parts.of_models(results),
            *texts(results),
            *lost(results, read_lines(answers) if answers.exists() else []),
        ],
    )


def in_words(results: Json) -> str:
    """What each model kept of the base's answers, and how far its distributions moved."""
    base, said = results["base"], []
    for name, of in results["models"].items():
        if name == base:
            continue
        if "all_tasks" in of:
            said.append(tasks_in_words(name, base, of["all_tasks"]))
        if "general" in of:
            said.append(
                f"On general text {name} is {float(of['kl_to_base']):.4f} nats per token from "
                f"{base}: its perplexity is {float(of['general']['perplexity']):.2f}, where "
                f"{base} has {float(results['models'][base]['general']['perplexity']):.2f}."
            )
    return " ".join(said) or f"Only {base} was measured."


def texts(results: Json) -> list[str]:
    """A line for each model and kind of text."""
    rows = [
        [name, kind, f"{of[kind]['tokens']:,}", digits(of[kind]["perplexity"], 2)]
        + [digits(of[kind][each], 4) for each in ("forward_kl", "reverse_kl")]
        + [f"{of[kind]['documents_worse']} of {of[kind]['documents']}"]
        for name, of in results["models"].items()
        for kind in KINDS
        if kind in of
    ]
    head = ["model", "text", "targets", "perplexity", "KL(base‖m)", "KL(m‖base)", "documents worse"]
    return [heading("Held-out text"), table(head, rows)] if rows else []


def lost(results: Json, answers: list[Json]) -> list[str]:
    """Questions that the base answers and a model does not, with what it answered instead."""
    right: dict[tuple[str, str, int], Json] = {}
    parts: list[str] = []
    base = results["base"]
    for row in answers:
        if row["model"] == base:
            right[place(row)] = row
    asked = [name for name, of in results["models"].items() if name != base and "tasks" in of]
    for name in asked:
        metrics = {task: of["metric"] for task, of in results["models"][name]["tasks"].items()}
        rows = [
            row
            for row in answers
            if row["model"] == name
            and not row["scores"][metrics[row["task"]]]
            and right[place(row)]["scores"][metrics[row["task"]]]
        ]
        parts += [heading(f"{name}: questions lost, {len(rows):,} in all", 3)] * bool(rows)
        for row in rows[:SHOWN]:
            parts.append(note(f"{row['task']}, question {row['question']:,}"))
            parts.append(
                quote(f"{row['prompt'][-LONGEST:]}\n→{row['answer']}  (right:{row['right']})")
            )
    return parts


def place(row: Json) -> tuple[str, str, int]:
    return row["task"], row.get("subtask", ""), row["question"]


def digits(value: float | str, number: int) -> str:
    """JSON holds NaN and infinities as text."""
    return f"{float(value):.{number}f}"
