"""The control experiment without a dump: a teacher in memory that runs in every step.

The divergence covers the whole vocabulary; as in the fused loss, only a few rows of logits exist at
a time. The top-k loss with k = V gives the same numbers, but more slowly.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.packing import PackedRow, domain_part, general_part
from pipeline.errors import ConfigError
from pipeline.losses import MIN_TAIL_LOGPROB, Direction
from pipeline.models.attention import enable_packing
from pipeline.models.directory import ModelFolder
from pipeline.models.head import LogitTransform, hidden_states, linear_head, logit_transform
from pipeline.study.targets import ArmTrainer

ROWS = 512  # rows of logits in memory at a time


class LiveTrainer(ArmTrainer):
    """Trains CE(domain) + alpha · KL(general) to the model in `teacher`, on one device.

    Raises ConfigError for a teacher that scales or soft-caps its logits, or has a head bias.
    """

    def __init__(self, *arguments: Any, teacher: ModelFolder, **options: Any) -> None:
        super().__init__(*arguments, **options)
        loaded = teacher.load("float32")
        enable_packing(loaded)
        if logit_transform(loaded) != LogitTransform() or linear_head(loaded).bias is not None:
            raise ConfigError(
                f"live teacher {teacher}: its logits are scaled, soft-capped or have a bias, which "
                "a live teacher does not support; make a dump and set targets: stored"
            )
        self.teacher: PreTrainedModel = loaded.to(self.args.device).eval()

    def compute_loss(
        self,
        model: Any,
        inputs: PackedRow,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        total = super().compute_loss(
            model, domain_part(inputs), num_items_in_batch=num_items_in_batch
        )
        general = general_part(inputs)
        at = general["targets"]["rows"]
        if not len(at):
            return (total, {}) if return_outputs else total
        student = self.accelerator.unwrap_model(model)
        with torch.no_grad():
            teacher_hidden = decode(self.teacher, general)[at]
        losses = full_divergence(
            decode(student, general)[at],
            linear_head(student).weight,
            teacher_hidden,
            linear_head(self.teacher).weight,
            self.loss.direction,
        )
        kl = losses.sum() / max(num_items_in_batch.tolist()[1], 1)
        self.sums[1] += kl.detach()
        total = total + self.loss.alpha * kl
        return (total, {}) if return_outputs else total


def decode(model: PreTrainedModel, row: PackedRow) -> Tensor:
    """Hidden states [T, D] of a packed row."""
    return hidden_states(model, row["input_ids"], row["position_ids"], row["sequence_lengths"])


def full_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    direction: Direction = "forward",
) -> Tensor:
    """KL of each row [N] in nats, over the whole vocabulary.

    hidden [N, D], weight [V, D]; the teacher's D and V may differ. Columns that only the teacher
    has are padding, and left out. Those that only the student has are one outcome, where the
    teacher gives nothing: the tail of the stored loss with every id of the teacher kept. Only the
    student's get gradients.
    """
    losses: Tensor = _FullDivergence.apply(
        hidden, weight, teacher_hidden, teacher_weight, direction
    )
    return losses


class _FullDivergence(torch.autograd.Function):
    """Computes the gradients in the forward; they are valid for a sum with equal weights."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        direction: Direction,
    ) -> Tensor:
        losses = hidden.new_empty(len(hidden))
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            log_q = (hidden[rows] @ weight.T).log_softmax(1)
            log_p = (teacher_hidden[rows] @ teacher_weight[: len(weight)].T).log_softmax(1)
            shared = log_p.shape[1]
            if direction == "forward":
                gap, q = log_p - log_q[:, :shared], log_q.exp_()
                p = log_p.exp_()
                losses[rows] = torch.linalg.vecdot(p, gap)
                grad = q
                grad[:, :shared] -= p
            else:
                extra = log_q[:, shared:].logsumexp(1, keepdim=True)
                gap = (MIN_TAIL_LOGPROB - extra).expand_as(log_q).clone()
                gap[:, :shared] = log_p - log_q[:, :shared]
                q = log_q.exp_()
                losses[rows] = -torch.linalg.vecdot(q, gap)
                grad = gap.add_(losses[rows, None]).mul_(q).neg_()
            grad_hidden[rows] = grad @ weight
            grad_weight.addmm_(grad.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_a_sum = grad.stride() == (0,)  # then one number: a look at values waits for the device
        if not (of_a_sum or (grad == grad[0]).all()):
            raise RuntimeError("full_divergence: the losses must have equal weights in the sum")
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad[0], grad_weight * grad[0], None, None, None
