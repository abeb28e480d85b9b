"""What a student gained and lost: perplexities, and its distance to the base model.

Everything is a mean over the predicted tokens of held-out text, so long documents count for more
than short ones. Documents become token sequences exactly as in training.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import model_dir
from pipeline.attention import enable_packing, packing_arguments
from pipeline.config import ConfigError, CorpusConfig, EvalConfig, RefusedError
from pipeline.corpus import Corpus
from pipeline.data import pack
from pipeline.mixing import Int32s, TokenSequences
from pipeline.progress import Progress, say

ROWS = 256  # positions whose full distributions are held in float32 at a time


@dataclass
class Sums:
    """Over predicted tokens, in nats; `a + b` adds two."""

    tokens: float = 0.0
    nll: float = 0.0
    """-log q(next token)"""
    forward_kl: float = 0.0
    """KL(base ‖ model), full vocabulary"""
    reverse_kl: float = 0.0
    """KL(model ‖ base), full vocabulary"""
    agreement: float = 0.0
    """positions where the model's most likely token is the base's"""

    def __add__(self, other: "Sums") -> "Sums":
        names = [field.name for field in fields(self)]
        return Sums(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    def report(self) -> dict[str, float]:
        """Means per token, for JSON."""
        return {
            "tokens": int(self.tokens),
            "perplexity": self.perplexity,
            "nats_per_token": self.nll / self.tokens,
            "forward_kl": self.forward_kl / self.tokens,
            "reverse_kl": self.reverse_kl / self.tokens,
            "top1_agreement": self.agreement / self.tokens,
        }


@torch.no_grad()  # not inference_mode: FSDP goes on training with what it gathers here
def compare(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    sequences: Iterable[Int32s],
    batch_tokens: int = 2048,
) -> Iterator[Sums]:
    """Sums for each batch of sequences; without a base (or with the model itself) no distances.

    Holds the logits of `batch_tokens` positions, or of one longer sequence, in the models' own
    dtypes, and ROWS rows of them in float32.
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
        packed = packing_arguments(model, lengths)
        logits = model(**inputs, **packed, use_cache=False).logits[0]
        other = None
        if base is not None and base is not model:
            packed = packing_arguments(base, lengths)
            other = base(**inputs, **packed, use_cache=False).logits[0]
        total = Sums()
        for at in range(0, len(rows), ROWS):
            part = rows[at : at + ROWS]
            against = None if other is None else other[part]
            total += measure(logits[part], labels[at : at + ROWS], against)
        yield total


def measure(logits: Tensor, labels: Tensor, base_logits: Tensor | None) -> Sums:
    """Sums over rows: logits [N, V], labels [N], base_logits [N, V] or None for the base itself."""
    logprobs = logits.float().log_softmax(-1)
    nll = -logprobs.gather(1, labels[:, None]).double().sum().item()
    if base_logits is None:
        return Sums(len(labels), nll, 0.0, 0.0, len(labels))
    base = base_logits.float().log_softmax(-1)
    gap = base - logprobs
    return Sums(
        len(labels),
        nll,
        (base.exp() * gap).sum(1).double().sum().item(),
        -(logprobs.exp() * gap).sum(1).double().sum().item(),
        (logprobs.argmax(1) == base.argmax(1)).sum().item(),
    )


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
    texts = {
        kind: held_out(corpus, tokenizer, config.max_length, config.add_eos)
        for kind, corpus in [("domain", config.domain), ("general", config.general)]
        if corpus is not None
    }
    base = load(folders[config.base], config.dtype)
    work = Progress(len(folders) * sum(len(text.ids) for text in texts.values()), "token")
    results: dict[str, Any] = {}
    try:
        for name, folder in folders.items():
            model = base if name == config.base else load(folder, config.dtype)
            measured = {}
            for kind, text in texts.items():
                total, done = Sums(), work.done
                for sums in compare(model, base, text, config.batch_tokens):
                    total += sums
                    work.update(done + int(total.tokens), partial(status_line, name, kind, total))
                work.update(done + len(text.ids), partial(status_line, name, kind, total))
                measured[kind] = total.report()
            results[name] = flat(measured) | measured
            del model
    finally:
        work.close()
    report = {"base": config.base, "models": results}
    print(table(report))
    if config.output:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        say(f"written to {path}")
    return report


def status_line(name: str, kind: str, total: Sums) -> str:
    return f"{name}, {kind} text: perplexity {total.perplexity:.2f}"


def held_out(
    corpus: CorpusConfig, tokenizer: Any, max_length: int, add_eos: bool
) -> TokenSequences:
    """A corpus for evaluation; ConfigError when nothing in it can be predicted."""
    text = TokenSequences(Corpus(corpus, tokenizer, max_length, add_eos))
    if not len(text):
        raise ConfigError(f"corpus {corpus.path}: no document has two tokens to evaluate on")
    return text


def load(folder: Path, dtype: str) -> PreTrainedModel:
    model = model_dir.load_model(folder, dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    enable_packing(model)
    return model


def flat(found: dict[str, Any]) -> dict[str, float]:
    """The three numbers that most people come for."""
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
        for kind in ("domain", "general"):
            if kind in found:
                of = found[kind]
                lines.append(
                    f"{name:<12} {kind:<14} {of['tokens']:>9,} {of['perplexity']:>11.3f} "
                    f"{of['forward_kl']:>11.4f} {of['reverse_kl']:>11.4f} "
                    f"{of['top1_agreement']:>11.1%}"
                )
    return "\n".join(lines)
