"""The arms that a study compares MoL from disk with: other targets for the same sequences.

Each changes the targets of a packed row (`data.batch_of`) just before the loss, so every arm of one
seed sees the same sequences in the same order, through the trainer that trains students.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import model_dir
from pipeline.attention import enable_packing, packing_arguments
from pipeline.study_config import ArmConfig
from pipeline.trainer import DistillTrainer

Row = dict[str, Any]
Retarget = Callable[[Row], Row]


class ArmTrainer(DistillTrainer):
    """A DistillTrainer that learns from other targets than the dump's own."""

    def __init__(self, *arguments: Any, retarget: list[Retarget], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.retarget = retarget

    def compute_loss(self, model: Any, inputs: Row, *arguments: Any, **options: Any) -> Any:
        for change in self.retarget:
            inputs = change(inputs)
        return super().compute_loss(model, inputs, *arguments, **options)


def retargets(arm: ArmConfig, base: Path) -> list[Retarget]:
    """What an arm does to each row, in turn; nothing for MoL from disk as it is shipped."""
    changes: list[Retarget] = []
    if not arm.domain:
        changes.append(without_domain)
    if arm.k is not None:
        k = arm.k
        changes.append(lambda row: cut(row, k))
    if arm.targets == "labels":
        changes.append(labels)
    elif arm.targets == "renormalised":
        changes.append(renormalised)
    elif arm.targets == "live":
        changes.append(Live(base))
    return changes


def labels(row: Row) -> Row:
    """Cross-entropy on the general text, too: its tokens count as the domain's do.

    The sum is divided by the domain's tokens, so general text weighs by its share of the batch, as
    in training on a mixed corpus; alpha has no part in it.
    """
    targets = row["targets"]
    no_general = {name: targets[name][:0] for name in ("ids", "logprobs", "tail_logprob")}
    following = row["input_ids"][0, targets["rows"] + 1]
    return row | {"targets": {**no_general, "rows": targets["rows"], "labels": following}}


def cut(row: Row, k: int) -> Row:
    """Only the k best entries; the others' mass goes to the tail, as if k had been dumped."""
    ids, logprobs = row["targets"]["ids"], row["targets"]["logprobs"]
    if k >= ids.shape[1]:
        return row
    rest = torch.cat([logprobs[:, k:], row["targets"]["tail_logprob"][:, None]], 1)
    changed = {"ids": ids[:, :k], "logprobs": logprobs[:, :k], "tail_logprob": rest.logsumexp(1)}
    return row | {"targets": row["targets"] | changed}


def renormalised(row: Row) -> Row:
    """Top-k scaled to sum to one, without a tail: the common mistake."""
    logprobs = row["targets"]["logprobs"]
    changed = {
        "logprobs": logprobs - logprobs.logsumexp(1, keepdim=True),
        "tail_logprob": torch.full_like(row["targets"]["tail_logprob"], -torch.inf),
    }
    return row | {"targets": row["targets"] | changed}


def without_domain(row: Row) -> Row:
    """The general sequences alone, which stand last; the whole row where there are none."""
    targets, lengths = row["targets"], list(row["sequence_lengths"])
    domain = len(targets["labels"])
    if domain == len(targets["rows"]):
        return row | {"targets": {name: value[:0] for name, value in targets.items()}}
    start = int(targets["rows"][domain])  # the first position of a sequence has a loss
    while sum(lengths) > row["input_ids"].shape[1] - start:
        lengths.pop(0)
    changed = {"rows": targets["rows"][domain:] - start, "labels": targets["labels"][:0]}
    return {
        "input_ids": row["input_ids"][:, start:],
        "position_ids": row["position_ids"][:, start:],
        "sequence_lengths": lengths,
        "targets": targets | changed,
    }


class Live:
    """A teacher in memory: its distributions over the whole vocabulary are the targets."""

    def __init__(self, folder: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher: PreTrainedModel = model_dir.load_model(folder, "float32").to(device).eval()
        enable_packing(self.teacher)

    @torch.no_grad()
    def __call__(self, row: Row) -> Row:
        targets = row["targets"]
        general = targets["rows"][len(targets["labels"]) :]
        logprobs = self.logprobs(row)[general]
        ids = torch.arange(logprobs.shape[1], device=logprobs.device).expand_as(logprobs)
        no_tail = torch.full_like(targets["tail_logprob"], -torch.inf)
        changed = {"ids": ids, "logprobs": logprobs, "tail_logprob": no_tail}
        return row | {"targets": targets | changed}

    def logprobs(self, row: Row) -> Tensor:
        """[T, V]"""
        logits: Tensor = self.teacher(
            input_ids=row["input_ids"],
            position_ids=row["position_ids"],
            use_cache=False,
            **packing_arguments(self.teacher, row["sequence_lengths"]),
        ).logits[0]
        return logits.float().log_softmax(-1)


def interpolate(base: Path, student: Path, weight: float, output: Path) -> None:
    """(1 - weight) · base + weight · student, saved like a student."""
    mixed, other = (model_dir.load_model(folder, "float32") for folder in (base, student))
    with torch.no_grad():
        for ours, theirs in zip(mixed.parameters(), other.parameters(), strict=True):
            ours.lerp_(theirs, weight)
    dtype = model_dir.own_dtype(model_dir.load_config(base))
    mixed.to(getattr(torch, dtype)).save_pretrained(output)
    model_dir.load_tokenizer(base).save_pretrained(output)
