"""The fused loss in float64 from its definition, and how far rounding may take it from that.

The bounds are those of rounding analysis, element by element. With u the unit roundoff of a dtype:

- A logit is a sum of D exact products in float32: it is off by at most D · u32 · Σ |h w|, and by
  what the bias, the scale and the cap round.
- A loss moves by Σ |∂L/∂z| times that, in second order by its square times the largest logarithm in
  it, and rounds itself: ROUNDS operations on numbers up to that logarithm.
- The gradient of a logit is made of terms like q, p and q a / b. Each is off by the relative error
  of an exponential, which is the error of its argument. `Truth.terms` is the sum of their sizes,
  so that a difference that cancels has the error of what it is made of.
- The gradient is then rounded to the compute dtype, multiplied with the weight (or the hidden
  states), summed, and rounded to the dtype of the result. A sum of n terms in float32 is off by
  8 √n · u32 of its absolute terms (Higham and Mary 2019: that fails by chance once in 10^13), on
  tensor cores, which cut off, by n / 16 · 2 u32 more: each takes 16 terms at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses import MIN_TAIL_LOGPROB, Direction, sparse_divergence

U32 = 2.0**-24
ROUNDS = 64
"""Roundings of a float32 number on its way, at most: about 20 operations, exponentials of up to 3
units in the last place."""
TINY = 1e-30
"""Smaller numbers may become 0."""


@dataclass
class Case:
    """The arguments of `linear_sparse_divergence`, in float64; targets on the same device."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    row_weights: Tensor
    direction: Direction
    scale: float = 1.0
    cap: float | None = None


@dataclass
class Truth:
    """In float64: losses, gradients, and what bounds their rounding."""

    losses: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor
    """gradient of the logits, before scale and cap [N, V]"""
    terms: Tensor
    """sizes of the terms that this gradient is made of [N, V]"""
    largest: float
    """the largest logarithm in the losses"""


def truth_of(case: Case) -> Truth:
    """Plain autograd on whole logits, in float64."""
    hidden, weight = (each.clone().requires_grad_() for each in (case.hidden, case.weight))
    bias = None if case.bias is None else case.bias.clone().requires_grad_()
    raw = hidden @ weight.T
    raw = raw if bias is None else raw + bias
    raw.retain_grad()
    z = raw * case.scale
    z = z if case.cap is None else case.cap * torch.tanh(z / case.cap)
    domain = len(case.labels)
    kl = sparse_divergence(z[domain:], case.ids, case.logprobs, case.tail, case.direction)
    losses = torch.cat([F.cross_entropy(z[:domain], case.labels, reduction="none"), kl])
    (case.row_weights * losses).sum().backward()
    with torch.no_grad():
        terms, largest = terms_of(case, z.detach(), losses.detach())
        terms *= (case.row_weights * case.scale)[:, None]
    grads: list[Any] = [hidden.grad, weight.grad, raw.grad]
    return Truth(
        losses.detach(), grads[0], grads[1], None if bias is None else bias.grad, grads[2], terms,
        largest,
    )  # fmt: skip


def terms_of(case: Case, z: Tensor, losses: Tensor) -> tuple[Tensor, float]:
    domain, log_q = len(case.labels), z.log_softmax(1)
    q = log_q.exp()
    terms = q.clone()  # cross-entropy: q, and 1 at the label
    terms[:domain].scatter_add_(1, case.labels[:, None], torch.ones_like(q[:domain, :1]))
    q, log_q, valid = q[domain:], log_q[domain:], case.logprobs > -torch.inf
    largest = float(-log_q.min()) + 1
    p = torch.zeros_like(q).scatter_add(1, case.ids, case.logprobs.exp())
    kept = torch.zeros_like(q).scatter_add(1, case.ids, valid.to(q.dtype)) > 0
    b = q.masked_fill(kept, 0).sum(1, keepdim=True)
    a = case.tail.exp()[:, None]
    if case.direction == "forward":
        outside = q * (1 + torch.where(b > 0, a / b, 0))
        terms[domain:] = torch.where(kept, q + p, outside)
    else:
        log_p = torch.zeros_like(q).scatter_add(1, case.ids, case.logprobs.where(valid, 0))
        log_a = case.tail.clamp(min=MIN_TAIL_LOGPROB)[:, None]
        log_b = torch.where(b > 0, b.log(), 0)
        size = torch.where(kept, log_q.abs() + log_p.abs(), log_b.abs() + log_a.abs())
        terms[domain:] = q * (1 + size + losses[domain:, None].abs())
        largest = max(largest, float(size.max()))
    finite = case.logprobs[valid]
    return terms, max(largest, float(-finite.min()) if len(finite) else 0.0)


@dataclass
class Bounds:
    """How far each number may be off, by rounding alone."""

    losses: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def bounds_of(case: Case, truth: Truth, compute: torch.dtype, stored: torch.dtype) -> Bounds:
    """For GEMMs in `compute` and gradients in `stored`."""
    double = compute == torch.float64
    u = U32 * 2.0**-29 if double else U32  # of losses and sums
    u_compute, u_stored = (torch.finfo(dtype).eps / 2 for dtype in (compute, stored))
    tensor_cores = compute == torch.bfloat16
    h, w = case.hidden.abs(), case.weight.abs()
    size = (h @ w.T).amax() + (0 if case.bias is None else case.bias.abs().amax())
    off = abs(case.scale) * float(size) * (case.hidden.shape[1] + 4) * u
    off += ROUNDS * u * (case.cap or 0)
    if tensor_cores and case.hidden.device.type == "cpu":
        off += abs(case.scale) * float(size) * u_compute  # there a product of bfloat16 is rounded
    per_loss = truth.logits.abs().sum(1) / (case.row_weights * abs(case.scale)).clamp(min=TINY)
    losses = per_loss * off + (1 + truth.largest) * off**2 + ROUNDS * u * truth.largest
    relative = 4 * off + ROUNDS * u * (1 + truth.largest)
    error = u_compute * truth.logits.abs() + relative * truth.terms

    def summed(n: int) -> float:
        return u * (8 * n**0.5 + (n / 8 if tensor_cores else 0))

    def product(one: Tensor, other: Tensor, n: int, result: Tensor) -> Tensor:
        sums = (error if one is truth.logits else error.T) @ other
        sums += summed(n) * (one.abs() @ other)
        return sums + max(u_stored, u_compute if stored == compute else u) * result.abs() + TINY

    vocabulary, rows = truth.logits.shape[1], truth.logits.shape[0]
    hidden = product(truth.logits, w, vocabulary, truth.hidden)
    hidden += u_compute * truth.hidden.abs()  # what the GEMM writes, before it is stored
    bias = None
    if truth.bias is not None:
        bias = error.sum(0) + (summed(rows) + u_stored) * truth.logits.abs().sum(0) + TINY
    return Bounds(losses, hidden, product(truth.logits.T, h, rows, truth.weight), bias)
