"""How the two parts of the objective pull: the norm of each one's gradient and their angle."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.rows import domain_part, general_part
from pipeline.training.fsdp import whole

if TYPE_CHECKING:
    from pipeline.training.trainer import DistillTrainer

Json = dict[str, Any]


def gradient_parts(
    trainer: "DistillTrainer", model: nn.Module, batches: list[Json], counts: Tensor
) -> dict[str, float]:
    """Of one optimizer step: the L2 norms of the gradients of CE and of alpha · KL over all
    trained parameters, "ce_grad_norm" and "kl_grad_norm", and "grad_cosine" between the two.

    The same objective, ranks and micro-batches as in the step that follows, whose course does not
    change. Domain and general sequences go through the model by themselves, so it costs one more
    forward and backward, and the memory of one more set of gradients.
    """
    rows = [row for batch in batches for row in batch["packed"]]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = [trainer.args.device] if trainer.args.device.type != "cpu" else []
    with torch.random.fork_rng(devices):
        ce = gradient(trainer, model, parameters, [domain_part(row) for row in rows], counts)
        kl = gradient(trainer, model, parameters, [general_part(row) for row in rows], counts)
    ce_norm, kl_norm = (math.sqrt(dot(part, part)) for part in (ce, kl))
    found = {"ce_grad_norm": ce_norm, "kl_grad_norm": kl_norm}
    if ce_norm > 0 and kl_norm > 0:
        found["grad_cosine"] = dot(ce, kl) / (ce_norm * kl_norm)
    return found


def gradient(
    trainer: "DistillTrainer",
    model: nn.Module,
    parameters: list[nn.Parameter],
    rows: list[Json],
    counts: Tensor,
) -> list[Tensor | None]:
    """Of the sum of the rows' losses, one for each parameter; they leave the parameters."""
    model.train()
    for number, row in enumerate(rows):
        with trainer.synchronised(model, number == len(rows) - 1):
            inputs = trainer._prepare_inputs(row)
            with trainer.compute_loss_context_manager():
                loss = trainer.row_losses(model, inputs, counts)["loss"]
            trainer.accelerator.backward(loss * trainer.accelerator.num_processes)
    found = [parameter.grad for parameter in parameters]
    model.zero_grad()
    return found


def dot(one: list[Tensor | None], other: list[Tensor | None]) -> float:
    """Σ one · other over all elements, on all ranks alike."""
    parts = [
        (a * b).sum(dtype=torch.float64)
        for a, b in zip(one, other, strict=True)
        if a is not None and b is not None
    ]
    return whole(sum(parts[1:], parts[0])).item() if parts else 0.0
