"""How the two parts of the objective pull: the norm of each gradient and the angle between them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.data.packing import PackedRow, domain_part, general_part
from pipeline.training.draws import own_draws
from pipeline.training.fsdp import whole

Backward = Callable[[PackedRow, bool], None]
"""Forward and backward of one packed row; True for the last row of an optimizer step."""


def gradient_parts(
    model: nn.Module, rows: list[PackedRow], backward: Backward, device: torch.device
) -> dict[str, float]:
    """L2 norms of one optimizer step's gradients of CE and of alpha · KL over all trained
    parameters, "ce_grad_norm" and "kl_grad_norm", and "grad_cosine" between the two.

    The step itself does not change. Domain and general sequences go through the model separately,
    which costs one more forward and backward and the memory of one more set of gradients.
    """
    model.train()
    with own_draws(device):
        ce = gradient(model, [domain_part(row) for row in rows], backward)
        kl = gradient(model, [general_part(row) for row in rows], backward)
    ce_norm, kl_norm = (math.sqrt(dot(part, part)) for part in (ce, kl))
    found = {"ce_grad_norm": ce_norm, "kl_grad_norm": kl_norm}
    if ce_norm > 0 and kl_norm > 0:
        found["grad_cosine"] = dot(ce, kl) / (ce_norm * kl_norm)
    return found


def gradient(model: nn.Module, rows: list[PackedRow], backward: Backward) -> list[Tensor | None]:
    """Gradient of the summed losses, per trained parameter; clears `.grad`."""
    for number, row in enumerate(rows):
        backward(row, number == len(rows) - 1)
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return found


def dot(one: list[Tensor | None], other: list[Tensor | None]) -> float:
    """Σ one · other over all elements, the same on all ranks."""
    parts = [
        (a * b).sum(dtype=torch.float64)
        for a, b in zip(one, other, strict=True)
        if a is not None and b is not None
    ]
    return whole(sum(parts[1:], parts[0])).item() if parts else 0.0
