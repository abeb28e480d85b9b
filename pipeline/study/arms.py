"""The arms that a study compares MoL from disk with: other targets for the same sequences.

Each changes the targets of a packed row (`data.batch_of`) just before the loss, so every arm of one
seed sees the same sequences in the same order, through the trainer that trains students.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.models import directory as model_dir
from pipeline.rows import general_part
from pipeline.study.config import ArmConfig
from pipeline.training.trainer import DistillTrainer

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


def retargets(arm: ArmConfig) -> list[Retarget]:
    """What an arm does to each row, in turn."""
    changes: list[Retarget] = []
    if not arm.domain:
        changes.append(general_part)
    if arm.k is not None:
        k = arm.k
        changes.append(lambda row: cut(row, k))
    if arm.targets == "labels":
        changes.append(labels)
    elif arm.targets == "renormalised":
        changes.append(renormalised)
    return changes


def trainer_of(arm: ArmConfig, base: Path) -> Callable[..., DistillTrainer]:
    """What makes the trainer of an arm: the product's own for MoL from disk as it is shipped."""
    from pipeline.study.live_teacher import LiveTrainer

    changes = retargets(arm)
    if arm.targets == "live":
        return partial(LiveTrainer, retarget=changes, teacher=base)
    return partial(ArmTrainer, retarget=changes) if changes else DistillTrainer


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


def interpolate(base: Path, student: Path, weight: float, output: Path) -> None:
    """(1 - weight) · base + weight · student, saved like a student."""
    mixed, other = (model_dir.load_model(folder, "float32") for folder in (base, student))
    with torch.no_grad():
        for ours, theirs in zip(mixed.parameters(), other.parameters(), strict=True):
            ours.lerp_(theirs, weight)
    dtype = model_dir.own_dtype(model_dir.load_config(base))
    mixed.to(getattr(torch, dtype)).save_pretrained(output)
    model_dir.load_tokenizer(base).save_pretrained(output)
