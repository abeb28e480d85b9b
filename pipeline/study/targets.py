"""Other targets for the same sequences, for a study's arms.

Each function changes the targets of a packed row just before the loss. So every arm of one seed
sees the same sequences in the same order, through the trainer that trains students.
"""

from collections.abc import Callable
from typing import Any

import torch

from pipeline.data.packing import PackedRow, general_part, with_targets
from pipeline.study.config import ArmConfig
from pipeline.training.trainer import DistillTrainer

Retarget = Callable[[PackedRow], PackedRow]


class ArmTrainer(DistillTrainer):
    """A DistillTrainer that learns from other targets than the dump's own."""

    def __init__(self, *arguments: Any, retarget: list[Retarget], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.retarget = retarget

    def compute_loss(self, model: Any, inputs: PackedRow, *arguments: Any, **options: Any) -> Any:
        for change in self.retarget:
            inputs = change(inputs)
        return super().compute_loss(model, inputs, *arguments, **options)


def retargets(arm: ArmConfig) -> list[Retarget]:
    """The changes that an arm makes to each row, in order."""
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


def labels(row: PackedRow) -> PackedRow:
    """Cross-entropy on the general text too, whose tokens count as the domain's do.

    The sum is divided by the domain's tokens, so general text weighs by its share of the batch, as
    in training on a mixed corpus. Alpha has no effect.
    """
    targets = row["targets"]
    return with_targets(
        row,
        labels=row["input_ids"][0, targets["rows"] + 1],
        ids=targets["ids"][:0],
        logprobs=targets["logprobs"][:0],
        tail_logprob=targets["tail_logprob"][:0],
    )


def cut(row: PackedRow, k: int) -> PackedRow:
    """Only the k best entries; the mass of the others goes to the tail, as in a dump of k."""
    ids, logprobs = row["targets"]["ids"], row["targets"]["logprobs"]
    if k >= ids.shape[1]:
        return row
    rest = torch.cat([logprobs[:, k:], row["targets"]["tail_logprob"][:, None]], 1)
    return with_targets(
        row, ids=ids[:, :k], logprobs=logprobs[:, :k], tail_logprob=rest.logsumexp(1)
    )


def renormalised(row: PackedRow) -> PackedRow:
    """Top-k scaled to sum to one, without a tail: the common mistake."""
    logprobs = row["targets"]["logprobs"]
    return with_targets(
        row,
        logprobs=logprobs - logprobs.logsumexp(1, keepdim=True),
        tail_logprob=torch.full_like(row["targets"]["tail_logprob"], -torch.inf),
    )
