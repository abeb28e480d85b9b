"""The in-place step of `losses.linear_sparse_divergence` as one kernel, for CUDA.

One program per row reads the logits twice, first for the logsumexp outside the kept ids, then for
the gradient, and writes the gradient once. Plain torch makes about ten such passes. The formulas
are those of `losses._divergence_`, term by term.

An id outside the vocabulary is never used as an address: its row's loss is NaN, which stops a run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # logits of a row held in registers at a time; gpu_compile.py shows what they take
WARPS = 8


@triton.jit
def _cap(z, CAP: tl.constexpr):
    """cap · tanh(z / cap); -inf, which marks the kept ids, stays -inf."""
    if CAP > 0:
        u = tl.exp(-2 * tl.abs(z) / CAP)
        size = CAP * (1 - u) / (1 + u)
        z = tl.where(z == float("-inf"), z, tl.where(z < 0, -size, size))
    return z


@triton.jit
def _slope(capped, CAP: tl.constexpr):
    """∂ capped / ∂ z"""
    if CAP > 0:
        share = tl.where(capped == float("-inf"), 0.0, capped / CAP)
        slope = 1 - share * share
    else:
        slope = 1.0
    return slope


@triton.jit
def _rows(
    z_ptr, grad_ptr, ids_ptr, logprobs_ptr, tail_ptr, weights_ptr, losses_ptr,
    V, K, z_stride, grad_stride,
    MIN_TAIL: tl.constexpr, REVERSE: tl.constexpr, GRADIENT: tl.constexpr, CAP: tl.constexpr,
    ENTRIES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row, grad_row = z_ptr + row * z_stride, grad_ptr + row * grad_stride
    entry = tl.arange(0, ENTRIES)
    there = entry < K
    ids = tl.load(ids_ptr + row * K + entry, mask=there, other=0)
    logprobs = tl.load(logprobs_ptr + row * K + entry, mask=there, other=float("-inf"))
    outside_vocab = (logprobs > float("-inf")) & ((ids < 0) | (ids >= V))
    valid = (logprobs > float("-inf")) & (ids >= 0) & (ids < V)
    tail = tl.load(tail_ptr + row)
    weight = tl.load(weights_ptr + row)
    z_kept = _cap(tl.load(z_row + ids, mask=valid, other=0.0).to(tl.float32), CAP)
    z_kept_or_none = tl.where(valid, z_kept, float("-inf"))
    tl.debug_barrier()  # read all entries before any is overwritten
    tl.store(z_row + ids, tl.full([ENTRIES], float("-inf"), z_ptr.dtype.element_ty), mask=valid)
    tl.debug_barrier()

    # Outside K: the largest logit and the sum of exp(z - largest), first per column of the block.
    top = tl.full([SIZE], float("-inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    for start in range(0, V, SIZE):
        column = start + tl.arange(0, SIZE)
        z = tl.load(z_row + column, mask=column < V, other=float("-inf")).to(tl.float32)
        z = _cap(z, CAP)
        higher = tl.maximum(top, z)
        safe = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp(top - safe) + tl.exp(z - safe)
        top = higher
    largest = tl.max(top, axis=0)
    largest = tl.where(largest > float("-inf"), largest, 0.0)  # K is the vocabulary
    tail_sum = tl.sum(total * tl.exp(top - largest), axis=0)
    lse_tail = tl.where(tail_sum > 0, largest + tl.log(tail_sum), float("-inf"))

    top_kept = tl.max(z_kept_or_none, axis=0)
    top_all = tl.maximum(top_kept, lse_tail)
    kept_sum = tl.sum(tl.exp(z_kept_or_none - top_all), axis=0)
    lse = top_all + tl.log(kept_sum + tl.exp(lse_tail - top_all))
    log_q = z_kept_or_none - lse
    log_b = lse_tail - lse
    q, b = tl.exp(log_q), tl.exp(log_b)
    log_q_safe = tl.where(valid, log_q, 0.0)
    logprobs_safe = tl.where(valid, logprobs, 0.0)
    log_b_safe = tl.where(b > 0, log_b, 0.0)
    if REVERSE:
        ratio = log_q_safe - logprobs_safe
        tail_ratio = tl.where(b > 0, log_b_safe - tl.maximum(tail, MIN_TAIL), 0.0)
        loss = tl.sum(q * ratio, axis=0) + b * tail_ratio
        entries, outside = q * (ratio - loss), b * (tail_ratio - loss)
    else:
        p = tl.where(valid, tl.exp(logprobs_safe), 0.0)
        a = tl.exp(tail)
        tail_safe = tl.where(a > 0, tail, 0.0)
        loss = tl.sum(p * (logprobs_safe - log_q_safe), axis=0)
        loss += tl.where(a > 0, a * (tail_safe - log_b), 0.0)
        entries, outside = q - p, b - a
    wrong = tl.sum(outside_vocab.to(tl.int32), axis=0)
    tl.store(losses_ptr + row, tl.where(wrong > 0, float("nan"), loss))

    if GRADIENT:
        scale = tl.where(tail_sum > 0, weight * outside / tail_sum, 0.0)
        for start in range(0, V, SIZE):
            column = start + tl.arange(0, SIZE)
            z = tl.load(z_row + column, mask=column < V, other=float("-inf")).to(tl.float32)
            z = _cap(z, CAP)
            grad = scale * tl.exp(z - largest) * _slope(z, CAP)
            tl.store(grad_row + column, grad.to(grad_ptr.dtype.element_ty), mask=column < V)
        tl.debug_barrier()  # write the zeros at K before the entries overwrite them
        entries = weight * entries * _slope(z_kept, CAP)
        tl.store(grad_row + ids, entries.to(grad_ptr.dtype.element_ty), mask=valid)


def step(
    z: Tensor,
    grad: Tensor | None,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    weights: Tensor,
    reverse: bool,
    soft_cap: float,
    min_tail_logprob: float,
) -> Tensor:
    """Losses float32 [N] of logits z [N, V], which are overwritten; fills grad [N, V].

    grad, of any floating dtype, receives weights · ∂loss/∂z. It may be z itself; None skips the
    gradient. soft_cap 0 means no cap. Raises ValueError where a row of z or grad has gaps.
    """
    if z.stride(1) != 1 or (grad is not None and grad.stride(1) != 1):
        raise ValueError("step: the logits of a row must lie side by side; use .contiguous()")
    rows, k = ids.shape
    losses = torch.empty(rows, dtype=torch.float32, device=z.device)
    if not rows:
        return losses
    out = z if grad is None else grad
    with torch.cuda.device_of(z):  # Triton launches on the current device
        _rows[(rows,)](
            z, out, ids.contiguous(), logprobs.float().contiguous(), tail.float().contiguous(),
            weights.float().contiguous(), losses,
            z.shape[1], k, z.stride(0), out.stride(0),
            MIN_TAIL=min_tail_logprob, REVERSE=reverse, GRADIENT=grad is not None, CAP=soft_cap,
            ENTRIES=triton.next_power_of_2(max(k, 1)),
            SIZE=min(BLOCK, triton.next_power_of_2(z.shape[1])),
            num_warps=WARPS,
        )  # fmt: skip
    return losses
