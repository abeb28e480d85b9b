"""Evaluate students: perplexities on held-out text, the distance to the base model, and tasks.

All measures of text are means over targets, so long documents weigh more than short ones. Documents
become token sequences exactly as in training; targets are their learnt tokens, all of them by
default.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from pipeline.config import KINDS, EvalConfig, held_out_texts
from pipeline.corpus import Corpus
from pipeline.errors import RefusedError
from pipeline.evaluation import task_results, task_table
from pipeline.evaluation.compare import batches, compare, load
from pipeline.evaluation.measures import Sums, by_document, intervals
from pipeline.evaluation.tasks import Tasks
from pipeline.json_files import write_json, write_lines
from pipeline.models import own_rows
from pipeline.models.attention import way_of
from pipeline.models.directory import ModelFolder
from pipeline.models.vocabulary import check_ids, difference_between
from pipeline.places import check_file, inputs_of
from pipeline.progress import Progress, say, show
from pipeline.token_sequences import TokenSequences, read_tokens
from pipeline.types import Json

WORST = 5  # documents shown as text
EXCERPT = 600  # characters of each
SHORTEST = 16  # targets that a shown document has at least


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate every model, write the results, print the table, return the results.

    Returns {"models": {name: {"domain_perplexity", "general_perplexity", "kl_to_base", "domain":
    {...}, "general": {...}}}, "base": name}; kl_to_base is KL(base ‖ model) on the general text.
    Raises RefusedError if a model's tokenizer differs from the base's.
    """
    folders = {name: ModelFolder.find(path) for name, path in config.models.items()}
    path = Path(config.output).expanduser() if config.output else None
    if path:
        found = {f"models.{name}": str(folder.path) for name, folder in folders.items()}
        for file in (path, answers_file(path)):
            check_file("output", str(file), {**dict(inputs_of(config)), **found})
    tasks = Tasks(config.tasks, config.batch_tokens)
    base = folders[config.base]
    for name, folder in folders.items():
        check_ids(folder)
        difference = difference_between(base, folder, config.add_eos, (config.base, name))
        if difference:
            raise RefusedError(
                f"model {name} ({folder}) has another tokenizer than {config.base}: {difference}. "
                "Their perplexities and distributions cannot be compared"
            )
        added = len(folder.tokenizer) - len(base.tokenizer)
        if added > 0:
            say(
                f"{name}: has {added:,} tokens that {config.base} lacks. All models read the "
                f"tokens of {config.base}'s tokenizer, so its own do not occur"
            )
    comparison = Comparison(config, folders[config.base])
    results = {name: comparison.measure(name, folder) for name, folder in folders.items()}
    report = {"base": config.base, "models": results}
    if path:  # before anything that may fail
        write_json(path, report)
        say(f"written to {path}")
    if comparison.texts:
        show(table(report))
        show(more(report))
    if config.tasks:
        answers = {name: comparison.answers(tasks, folder) for name, folder in folders.items()}
        metrics = {task: tasks.metric(task, rows) for task, rows in answers[config.base].items()}
        for name, given in answers.items():
            results[name] |= task_results.task_results(given, answers[config.base], metrics)
        if path:
            write_json(path, report)
            write_lines(answers_file(path), answer_rows(answers))
            say(f"answers written to {answers_file(path)}")
        show(task_table.table(report))
    return report


def answers_file(results: Path) -> Path:
    """The file with the answers to the tasks, beside that of the results."""
    return results.with_name(f"{results.stem}.answers.jsonl")


def answer_rows(answers: dict[str, task_results.Answers]) -> Iterator[Json]:
    """Every answer with the name of its model."""
    for name, tasks in answers.items():
        for rows in tasks.values():
            yield from ({"model": name} | row for row in rows)


class Comparison:
    """Measures models, one at a time, against one base on the same held-out texts."""

    def __init__(self, config: EvalConfig, base: ModelFolder) -> None:
        self.config, self.base_folder = config, base
        self.texts = {
            kind: read_tokens(
                Corpus(corpus, base.tokenizer, config.max_length, config.add_eos)
            ).spread(config.sequences)
            for kind, corpus in held_out_texts(config)
        }
        self.base = self.load(base)
        self._base_sums: dict[str, list[Sums]] = {}

    def measure(self, name: str, folder: ModelFolder) -> dict[str, Any]:
        """{"domain_perplexity", "general_perplexity", "kl_to_base", "domain": {...}, ...}"""
        itself = folder == self.base_folder
        if not itself and not self._base_sums:
            self.measure(self.config.base, self.base_folder)
        model = self.base if itself else self.load(folder)
        sums = self.sums(name, model)
        if itself:
            self._base_sums = sums
        measured: dict[str, Any] = {}
        for kind, of in sums.items():
            text, against = self.texts[kind], self._base_sums[kind]
            measured[kind] = sum(of, Sums()).report() | by_documents(of, against, text)
            if not itself:
                measured[kind]["worst"] = worst(of, against, text, self.base_folder.tokenizer)
        return flat(measured) | measured

    def answers(self, tasks: Tasks, folder: ModelFolder) -> task_results.Answers:
        """The answers of a model to each task. All models read the base's tokenizer."""
        own = folder == self.base_folder
        model = self.base if own else load(folder, self.config.dtype)
        return {name: tasks.answers(name, model, self.base_folder.tokenizer) for name in tasks}

    def load(self, folder: ModelFolder) -> PreTrainedModel:
        """The model of a directory; says what it costs where packed sequences need own rows."""
        model = load(folder, self.config.dtype)
        if way_of(model).own_rows:
            rows = [
                [len(sequence) for sequence in batch]
                for text in self.texts.values()
                for batch in batches(text, self.config.batch_tokens)
            ]
            say(own_rows.cost(model, own_rows.padding(rows)))
        return model

    def sums(self, name: str, model: PreTrainedModel) -> dict[str, list[Sums]]:
        """Sums of each sequence, by kind of text."""
        found: dict[str, list[Sums]] = {}
        work = Progress(sum(text.target_count for text in self.texts.values()), "token")
        try:
            done = 0
            for kind, text in self.texts.items():
                found[kind], total = [], Sums()
                options = self.config.batch_tokens, self.config.tail_k
                for sums in compare(model, self.base, text, *options):
                    found[kind].append(sums)
                    total += sums
                    work.update(done + int(total.tokens), partial(status_line, name, kind, total))
                done += text.target_count
        finally:
            work.close()
        return found


def status_line(name: str, kind: str, total: Sums) -> str:
    return f"{name}, {kind} text: perplexity {total.perplexity:.2f}"


def by_documents(sums: list[Sums], against: list[Sums], text: TokenSequences) -> dict[str, Any]:
    """How a text's measures vary between its documents: counts and bootstrap intervals."""
    model, base = (by_document(of, text.documents) for of in (sums, against))
    rise = model[:, 1] / model[:, 0] - base[:, 1] / base[:, 0]
    return {
        "documents": len(model),
        "documents_worse": int((~(rise <= 0)).sum()),  # NaN is worse
        "intervals": intervals(model, base),
    }


def worst(
    sums: list[Sums], against: list[Sums], text: TokenSequences, tokenizer: Any
) -> list[dict[str, Any]]:
    """The WORST documents by rise of nats per token over the base's, with an excerpt of each.

    The excerpt is the start of the document's worst sequence.
    """
    changes = np.array([a.nll - b.nll for a, b in zip(sums, against, strict=True)])
    model, base = (by_document(of, text.documents) for of in (sums, against))
    names = np.unique(text.documents)
    rise = (model[:, 1] - base[:, 1]) / model[:, 0]
    worst_first = np.argsort(-np.where(np.isnan(rise), np.inf, rise), kind="stable")
    order = [at for at in worst_first if model[at, 0] >= SHORTEST]
    found = []
    for at in order[:WORST]:
        own = np.flatnonzero(text.documents == names[at])
        shown = text[int(own[changes[own].argmax()])]
        found.append(
            {
                "document": int(names[at]),
                "tokens": int(model[at, 0]),
                "nats_per_token": float(model[at, 1] / model[at, 0]),
                "base_nats_per_token": float(base[at, 1] / base[at, 0]),
                "text": tokenizer.decode(shown.input_ids[: EXCERPT // 2])[:EXCERPT],
            }
        )
    return found


def flat(found: dict[str, Any]) -> dict[str, float]:
    """The headline numbers of one model."""
    names = {f"{kind}_perplexity": found[kind]["perplexity"] for kind in found}
    if "general" in found:
        names["kl_to_base"] = found["general"]["forward_kl"]
    return names


def table(report: dict[str, Any]) -> str:
    """The results as text, one line per model and kind of text."""
    head = f"{'model':<12} {'held-out text':<14} {'targets':>9} {'perplexity':>11} "
    head += f"{'KL(base‖m)':>11} {'KL(m‖base)':>11} {'same top-1':>11}"
    lines = [head, "-" * len(head)]
    for name, found in report["models"].items():
        for kind in KINDS:
            if kind in found:
                of = found[kind]
                lines.append(
                    f"{name:<12} {kind:<14} {of['tokens']:>9,} {of['perplexity']:>11.3f} "
                    f"{of['forward_kl']:>11.4f} {of['reverse_kl']:>11.4f} "
                    f"{of['top1_agreement']:>11.1%}"
                )
    return "\n".join(lines)


def more(report: dict[str, Any]) -> str:
    """A second table as text: intervals, tail measures, calibration."""
    head = f"{'':<12} {'':<14} {'perplexity, 95 % of resampled documents':>40} "
    head += f"{'tail mass':>10} {'tail KL':>8} {'ECE':>7} {'documents worse':>16}"
    lines = ["", head]
    for name, found in report["models"].items():
        for kind in KINDS:
            if kind in found:
                of = found[kind]
                low, high = of["intervals"]["perplexity"]
                worse = f"{of['documents_worse']} of {of['documents']}"
                lines.append(
                    f"{name:<12} {kind:<14} {f'{low:.3f} to {high:.3f}':>40} "
                    f"{of['tail_mass']:>10.4f} {of['tail_kl']:>8.4f} {of['ece']:>7.4f} {worse:>16}"
                )
    return "\n".join(lines)
