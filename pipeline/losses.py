"""Divergences between stored top-k distributions and a student, on the outcomes {K, tail}.

A stored distribution gives probabilities p_j to k kept ids K and the rest, a, to the tail. With
q = softmax(z) and b = 1 - Σ_K q_j the student's mass outside K, all terms live on k + 1 outcomes:

    forward  L = Σ p_j (log p_j - log q_j) + a (log a - log b)
             ∂L/∂z_j = q_j - p_j                     on K,   q_j (1 - a/b)          outside
    reverse  L = Σ q_j (log q_j - log p_j) + b (log b - log a)
             ∂L/∂z_j = q_j (log (q_j / p_j) - L)     on K,   q_j (log (b / a) - L)  outside

Cross-entropy on y is the forward form with K = {y}, p_y = 1, a = 0. So the gradient of every row is
one scalar times softmax(z) with k entries overwritten, whatever the loss, and one fused linear loss
serves both corpora. By the log-sum inequality both divergences lie between 0 and the KL over the
full vocabulary; they equal it when K is the vocabulary.

The student's head may be wider than the teacher's: padding columns and added tokens lie in the
student's b, and add nothing to a. With p_x = 0 for each such id x, no formula changes:

    forward  q_x (1 - a/b) is their gradient, and q_x where a = 0: they are pushed to zero
    reverse  q_x (log (b / a) - L); where a = 0 the divergence is infinite, and see MIN_TAIL_LOGPROB

Where the student's head is narrower, `TopK.fold` moves the stored mass of the ids that it lacks
into a: a' = a + Σ p_x.

`sparse_divergence` is the reference; training uses `linear_sparse_divergence`.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

try:
    from pipeline import losses_triton
except ImportError:  # some platforms have no Triton; plain torch is used there
    losses_triton = None  # type: ignore[assignment]

Direction = Literal["forward", "reverse"]

# The reverse divergence is infinite where the student has mass outside K and the teacher has none
# (a = 0). There, a becomes e^-30: below the resolution of a float32 softmax, and the loss is finite
# and still pushes the student's tail towards zero.
MIN_TAIL_LOGPROB = -30.0
# Bytes of logits held at a time. More rows make the weight gradient's GEMM less memory-bound on a
# GPU; on a CPU the buffer should be near the size of the caches.
BUFFER_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


def sparse_divergence(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail_logprob: Tensor,
    direction: Direction = "forward",
) -> Tensor:
    """KL of each row [N] in nats: the reference, in plain autograd and the dtype of the logits.

    logits        [N, V]
    ids           [N, K]  kept ids, distinct within a row; any id where the logprob is -inf
    logprobs      [N, K]  the teacher's log-probabilities, -inf for padding entries
    tail_logprob  [N]     log of the teacher's mass outside the kept ids, -inf where there is none

    Each teacher row must sum to one, tail included. Raises ValueError for an unknown direction.
    """
    _check_direction(direction)
    log_q_full = logits.log_softmax(-1)
    valid = logprobs > -torch.inf
    kept = torch.zeros_like(log_q_full).scatter_add(1, ids, valid.to(log_q_full.dtype)) > 0
    no_tail = kept.all(1)  # K is the vocabulary: b = 0, and logsumexp of nothing has no gradient
    log_b = log_q_full.masked_fill(kept & ~no_tail[:, None], -torch.inf).logsumexp(1)
    log_q = log_q_full.gather(1, ids)
    if direction == "forward":
        a = tail_logprob.exp()
        rows = torch.where(valid, logprobs.exp() * (logprobs - log_q), 0).sum(1)
        return rows + torch.where((a > 0) & ~no_tail, a * (tail_logprob - log_b), 0)
    log_a = tail_logprob.clamp(min=MIN_TAIL_LOGPROB)
    rows = torch.where(valid, log_q.exp() * (log_q - logprobs.where(valid, 0)), 0).sum(1)
    return rows + torch.where(no_tail, 0, log_b.exp() * (log_b - log_a))


@torch.compiler.disable  # no gain: chunks, in-place steps and a Triton kernel
def linear_sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail_logprob: Tensor,
    direction: Direction = "forward",
    *,
    labels: Tensor | None = None,
    row_weights: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of losses on logits = hidden @ weight.T + bias, computed chunk by chunk.

    hidden       [C + N, D]  cross-entropy scores the first C rows, `sparse_divergence` the
                             others; C = len(labels), 0 without labels
    weight       [V, D]      the model's head; `bias` [V] or None
    ids, logprobs [N, K], tail_logprob [N], direction: as in `sparse_divergence`
    labels       [C]         token ids
    row_weights  [C + N]     weights in the sum, 1 by default
    logit_scale              multiplies the logits, bias included
    soft_cap                 then turns them into cap · tanh(logits / cap), as Gemma does

    Returns (Σ weight · loss, a scalar with gradients to hidden, weight and bias; the losses [C + N]
    in nats, without gradients). The forward computes the gradients in chunks of `chunk_rows` rows;
    backward only scales them. Logits and softmax are float32 (float64 for float64 inputs), the
    GEMMs use the autocast dtype if autocast is on, and the gradient of the weight accumulates in
    float32. Raises ValueError for shapes that do not match, an unknown direction, and float16, in
    which row weights would underflow.
    """
    _check_direction(direction)
    labels = ids.new_zeros(0) if labels is None else labels
    rows = len(labels) + len(ids)
    if hidden.shape[0] != rows or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} for {len(labels)} "
            f"labels and {len(ids)} distributions: expected hidden [{rows}, {weight.shape[1]}]"
        )
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    compute_dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    if compute_dtype == torch.float16:
        raise ValueError("float16 logit gradients underflow; use bfloat16 (training.bf16: true)")
    if chunk_rows is None:
        chunk_rows = max(16, BUFFER_BYTES.get(device, 1 << 28) // (4 * weight.shape[0]))
    if row_weights is None:
        row_weights = torch.ones(rows, device=hidden.device)
    with torch.autocast(device, enabled=False):
        total, losses = _FusedLinear.apply(
            hidden,
            weight,
            bias,
            row_weights,
            (labels, ids, logprobs, tail_logprob, direction),
            (chunk_rows, compute_dtype, torch.is_grad_enabled(), logit_scale, soft_cap or 0.0),
        )
    return total, losses


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weights: Tensor,
        targets: tuple[Tensor, Tensor, Tensor, Tensor, Direction],
        settings: tuple[int, torch.dtype, bool, float, float],
    ) -> tuple[Tensor, Tensor]:
        chunk_rows, compute_dtype, grad_enabled, logit_scale, soft_cap = settings
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        head = weight.to(compute_dtype)
        grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        # The first chunk overwrites the weight's gradient: zeroing [V, D] costs as much as a sum.
        new = torch.empty_like if len(hidden) else torch.zeros_like
        grad_weight = new(weight, dtype=exact) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if needs[2] and bias is not None else None
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        # One buffer for all chunks: malloc would return new, zeroed pages for each chunk.
        size = (min(chunk_rows, len(hidden)), len(weight))
        buffer = torch.empty(size, dtype=exact, device=hidden.device)
        # The gradient overwrites the logits. If the GPU's GEMMs use another dtype, it goes to a
        # second buffer of that dtype; on a CPU it stays exact for the weight's gradient.
        apart = hidden.is_cuda and compute_dtype != exact and any(needs)
        grad_buffer = torch.empty_like(buffer, dtype=compute_dtype) if apart else None
        chunks = _chunks(*targets, chunk_rows)
        for number, (rows, ids, logprobs, tail, direction) in enumerate(chunks):
            h = hidden[rows].to(compute_dtype)
            z = _matmul_into_(buffer[: len(h)], h, head.t())
            if bias is not None:
                z += bias
            if logit_scale != 1:
                z *= logit_scale
            grad = None
            if any(needs):
                grad = z if grad_buffer is None else grad_buffer[: len(h)]
            weights = row_weights[rows].to(exact) * logit_scale
            losses[rows] = _step_(z, grad, ids, logprobs, tail, weights, direction, soft_cap)
            if grad is None:
                continue
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=exact)
            rounded = grad.to(compute_dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = rounded @ head
            if grad_weight is not None:
                _add_matmul_(grad_weight, grad, rounded, h, keep=number > 0)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(losses)
        return (row_weights.to(exact) * losses).sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "linear_sparse_divergence: backward can run only once; compute the loss again"
            )
        for grad in grads:
            if grad is not None:  # in place: a second [V, D] would set the step's peak memory
                # Tensor.mul_ by a scalar in GPU memory reads and writes a number at a time.
                torch._foreach_mul_([grad], grad_total.to(grad.dtype))
        return (*grads, None, None, None)


def _chunks(
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    direction: Direction,
    size: int,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Direction]]:
    """Yield row ranges with their targets; each label becomes a distribution of one entry.

    At most `size` rows at a time, in chunks of equal size: a small last one would cost more.
    """
    labels_at_once, ids_at_once = _even(len(labels), size), _even(len(ids), size)
    for start in range(0, len(labels), labels_at_once):
        ys = labels[start : start + labels_at_once, None].long()
        certain = torch.zeros(len(ys), 1, device=ys.device)
        none = torch.full_like(certain[:, 0], -torch.inf)
        yield slice(start, start + len(ys)), ys, certain, none, "forward"
    for start in range(0, len(ids), ids_at_once):
        stop = min(start + ids_at_once, len(ids))
        rows = slice(len(labels) + start, len(labels) + stop)
        yield rows, ids[start:stop].long(), logprobs[start:stop], tail[start:stop], direction


def _even(rows: int, most: int) -> int:
    """Rows of each of the fewest chunks of at most `most` rows."""
    return -(-rows // max(1, -(-rows // most))) or 1


def _step_(
    z: Tensor,
    grad: Tensor | None,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    weights: Tensor,
    direction: Direction,
    soft_cap: float,
) -> Tensor:
    """Losses [N] of logits z [N, V], which are overwritten; grad becomes weights · ∂loss/∂z.

    grad is z itself, a tensor of its shape, or None. soft_cap 0 means no cap.
    """
    if z.is_cuda and z.dtype == torch.float32 and losses_triton is not None:
        reverse = direction == "reverse"
        return losses_triton.step(
            z, grad, ids, logprobs, tail, weights, reverse, soft_cap, MIN_TAIL_LOGPROB
        )
    slope = None
    if soft_cap:
        z.div_(soft_cap).tanh_()
        slope = None if grad is None else 1 - z * z
        z.mul_(soft_cap)
    loss, scale, entries = _divergence_(z, ids, logprobs.to(z), tail.to(z), direction)
    if grad is not None:
        # z holds exp(z - max) outside K and zeros at K: one scaling and one scatter turn it into
        # the gradient.
        z.mul_((weights * scale)[:, None]).scatter_add_(1, ids, weights[:, None] * entries)
        if slope is not None:
            z.mul_(slope)
        if grad is not z:
            grad.copy_(z)
    return loss


def _divergence_(
    z: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, direction: Direction
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [N], scale [N], entries [N, K]) of logits z [N, V], which is overwritten.

    z becomes exp(z - max) outside K and 0 at K; the gradient is scale · z, plus entries at the ids.
    The separate sum over the tail gives log b without the cancellation in 1 - Σ q.
    """
    valid = logprobs > -torch.inf
    z_kept = z.gather(1, ids).masked_fill(~valid, -torch.inf)
    # Padding entries add 0, because a valid entry of the row may have the same id.
    z.scatter_add_(1, ids, torch.zeros_like(z_kept).masked_fill(valid, -torch.inf))
    top = z.amax(1)
    top = top.where(top > -torch.inf, 0)  # K is the vocabulary
    tail_sum = z.sub_(top[:, None]).exp_().sum(1)
    lse_tail = top + tail_sum.log()
    lse = torch.logaddexp(lse_tail, z_kept.logsumexp(1))
    log_q, log_b = z_kept - lse[:, None], lse_tail - lse
    q, b = log_q.exp(), log_b.exp()
    if direction == "forward":
        p, a = logprobs.exp(), tail.exp()
        loss = torch.where(valid, p * (logprobs - log_q), 0).sum(1)
        loss += torch.where(a > 0, a * (tail - log_b), 0)
        entries, outside = q - p, b - a
    else:
        ratio = torch.where(valid, log_q - logprobs, 0)
        tail_ratio = torch.where(b > 0, log_b - tail.clamp(min=MIN_TAIL_LOGPROB), 0)
        loss = (q * ratio).sum(1) + b * tail_ratio
        entries, outside = q * (ratio - loss[:, None]), b * (tail_ratio - loss)
    scale = torch.where(tail_sum > 0, outside / tail_sum, 0)
    return loss, scale, entries.masked_fill(~valid, 0)


def _matmul_into_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a @ b. On a GPU the product of bfloat16 factors is not rounded to bfloat16."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def _add_matmul_(total: Tensor, grad: Tensor, rounded: Tensor, h: Tensor, keep: bool) -> None:
    """total += grad.T @ h, accumulated in total's float32; without `keep` total = grad.T @ h."""
    if h.is_cuda and h.dtype != total.dtype:
        if keep:
            torch.addmm(total, rounded.t(), h, out_dtype=total.dtype, out=total)
        else:
            torch.mm(rounded.t(), h, out_dtype=total.dtype, out=total)
    elif keep:
        total.addmm_(grad.t(), h.to(total.dtype))
    else:
        torch.mm(grad.t(), h.to(total.dtype), out=total)


def _check_direction(direction: str) -> None:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', found {direction!r}")
