"""What a student gained and lost: perplexities, and its distance to the base model.

Everything is a mean over the predicted tokens of held-out text, so long documents count for more
than short ones. Documents become token sequences exactly as in training.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import KINDS, EvalConfig, held_out_texts
from pipeline.corpus import TokenSequences, held_out
from pipeline.data.packing import pack
from pipeline.errors import RefusedError
from pipeline.evaluation.measures import Sums, by_document, intervals, measure
from pipeline.models import directory as model_dir
from pipeline.models.attention import enable_packing, packing_arguments
from pipeline.progress import Progress, say
from pipeline.types import Int32s

WORST = 5  # documents shown as text
EXCERPT = 600  # characters of each
SHORTEST = 16  # predicted tokens of a document that can be among them


@torch.no_grad()  # not inference_mode: FSDP goes on training with what it gathers here
def compare(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    sequences: Iterable[Int32s],
    batch_tokens: int = 2048,
    tail_k: int = 64,
) -> Iterator[Sums]:
    """Sums of each sequence, in order; without a base no distances, and 0 to the model itself.

    Holds the logits of `batch_tokens` positions, or of one longer sequence, in the models' own
    dtypes, and a few rows of them in float32.
    """
    for batch in batches(sequences, batch_tokens):
        lengths = [len(sequence) for sequence in batch]
        input_ids, position_ids, predicts = pack(batch)
        inputs = {
            "input_ids": torch.from_numpy(input_ids)[None].to(model.device),
            "position_ids": torch.from_numpy(position_ids)[None].to(model.device),
        }
        rows = torch.from_numpy(predicts).nonzero()[:, 0].to(model.device)
        labels = inputs["input_ids"][0, rows + 1]
        logits, other = (
            None if of is None else predict(of, inputs, lengths, rows)
            for of in (model, None if base is model else base)
        )
        assert logits is not None
        measured = measure(logits, labels, logits if base is model else other, tail_k)
        yield from map(Sums.of, np.split(measured, np.cumsum([n - 1 for n in lengths])[:-1]))


def predict(
    model: PreTrainedModel, inputs: dict[str, Tensor], lengths: list[int], rows: Tensor
) -> Tensor:
    """[N, V] logits at these positions of one packed row."""
    packed = packing_arguments(model, lengths)
    logits: Tensor = model(**inputs, **packed, use_cache=False).logits[0, rows]
    return logits


def batches(sequences: Iterable[Int32s], tokens: int) -> Iterator[list[Int32s]]:
    """Neighbours together, up to so many tokens."""
    batch: list[Int32s] = []
    size = 0
    for sequence in sequences:
        if batch and size + len(sequence) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(sequence)
        size += len(sequence)
    if batch:
        yield batch


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate every model, print the table, write and return the results.

    {"models": {name: {"domain_perplexity", "general_perplexity", "kl_to_base", "domain": {...},
    "general": {...}}}, "base": name}; kl_to_base is KL(base ‖ model) on the general text.
    """
    folders = {name: model_dir.resolve(path) for name, path in config.models.items()}
    tokenizer = model_dir.load_tokenizer(folders[config.base])
    expected = model_dir.tokenizer_fingerprint(tokenizer)
    for name, folder in folders.items():
        found = model_dir.tokenizer_fingerprint(model_dir.load_tokenizer(folder))
        if found != expected:
            raise RefusedError(
                f"model {name} ({folder}) has another tokenizer than {config.base}: their "
                "perplexities and distributions cannot be compared"
            )
    comparison = Comparison(config, folders[config.base], tokenizer)
    results = {name: comparison.measure(name, folder) for name, folder in folders.items()}
    report = {"base": config.base, "models": results}
    print(table(report))
    print(more(report))
    if config.output:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        say(f"written to {path}")
    return report


class Comparison:
    """A base and held-out texts, to measure models against, one after the other."""

    def __init__(self, config: EvalConfig, base: Path, tokenizer: Any) -> None:
        self.config, self.base_folder, self.tokenizer = config, base, tokenizer
        self.texts = {
            kind: held_out(corpus, tokenizer, config.max_length, config.add_eos).spread(
                config.sequences
            )
            for kind, corpus in held_out_texts(config)
        }
        self.base = load(base, config.dtype)
        self._base_sums: dict[str, list[Sums]] = {}

    def measure(self, name: str, folder: Path) -> dict[str, Any]:
        """{"domain_perplexity", "general_perplexity", "kl_to_base", "domain": {...}, ...}"""
        itself = folder == self.base_folder
        if not itself and not self._base_sums:
            self.measure(self.config.base, self.base_folder)
        model = self.base if itself else load(folder, self.config.dtype)
        sums = self.sums(name, model)
        if itself:
            self._base_sums = sums
        measured: dict[str, Any] = {}
        for kind, of in sums.items():
            text, against = self.texts[kind], self._base_sums[kind]
            measured[kind] = sum(of, Sums()).report() | by_documents(of, against, text)
            if not itself:
                measured[kind]["worst"] = worst(of, against, text, self.tokenizer)
        return flat(measured) | measured

    def sums(self, name: str, model: PreTrainedModel) -> dict[str, list[Sums]]:
        """Of each sequence of each text."""
        found: dict[str, list[Sums]] = {}
        work = Progress(sum(len(text.ids) for text in self.texts.values()), "token")
        try:
            done = 0
            for kind, text in self.texts.items():
                found[kind], total = [], Sums()
                options = self.config.batch_tokens, self.config.tail_k
                for sums in compare(model, self.base, text, *options):
                    found[kind].append(sums)
                    total += sums
                    work.update(done + int(total.tokens), partial(status_line, name, kind, total))
                done += len(text.ids)
        finally:
            work.close()
        return found


def status_line(name: str, kind: str, total: Sums) -> str:
    return f"{name}, {kind} text: perplexity {total.perplexity:.2f}"


def by_documents(sums: list[Sums], against: list[Sums], text: TokenSequences) -> dict[str, Any]:
    """How the sums of a text's sequences vary from document to document."""
    model, base = (by_document(of, text.documents) for of in (sums, against))
    rise = model[:, 1] / model[:, 0] - base[:, 1] / base[:, 0]
    return {
        "documents": len(model),
        "documents_worse": int((rise > 0).sum()),
        "intervals": intervals(model, base),
    }


def worst(
    sums: list[Sums], against: list[Sums], text: TokenSequences, tokenizer: Any
) -> list[dict[str, Any]]:
    """The documents whose nats per token rose most over the base's, each with the beginning of its
    worst sequence."""
    changes = np.array([a.nll - b.nll for a, b in zip(sums, against, strict=True)])
    model, base = (by_document(of, text.documents) for of in (sums, against))
    names = np.unique(text.documents)
    rise = (model[:, 1] - base[:, 1]) / model[:, 0]
    order = [at for at in np.argsort(-rise, kind="stable") if model[at, 0] >= SHORTEST]
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
                "text": tokenizer.decode(shown[: EXCERPT // 2])[:EXCERPT],
            }
        )
    return found


def load(folder: Path, dtype: str) -> PreTrainedModel:
    model = model_dir.load_model(folder, dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    enable_packing(model)
    return model


def flat(found: dict[str, Any]) -> dict[str, float]:
    """The numbers that most people come for."""
    names = {f"{kind}_perplexity": found[kind]["perplexity"] for kind in found}
    if "general" in found:
        names["kl_to_base"] = found["general"]["forward_kl"]
    return names


def table(report: dict[str, Any]) -> str:
    """The results as text: one line for each model and text."""
    head = f"{'model':<12} {'held-out text':<14} {'tokens':>9} {'perplexity':>11} "
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
    """What does not fit into the table: intervals, the tail, calibration."""
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
