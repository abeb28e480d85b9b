"""The invariants of the losses, in float64; the fused loss against the reference and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses import (
    MIN_TAIL_LOGPROB,
    _chunks,
    linear_sparse_divergence,
    sparse_divergence,
)
from tests.helpers.losses import DIRECTIONS, both, ragged, teacher

N, V, D, K = 13, 41, 7, 5


def student(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], bias [V]"""
    torch.manual_seed(seed)
    shapes = [(N, D), (V, D), (V,)]
    hidden, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def logits_of(seed: int) -> Tensor:
    torch.manual_seed(100 + seed)
    return torch.randn(N, V, dtype=torch.float64) * 2


def full_kl(logits: Tensor, base: Tensor, direction: str) -> Tensor:
    p, q = base.log_softmax(-1), logits.log_softmax(-1)
    p, q = (p, q) if direction == "forward" else (q, p)
    return (p.exp() * (p - q)).sum(-1)


@both
@pytest.mark.parametrize("k", [1, K, V])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(direction: str, k: int) -> None:
    logits = logits_of(0).requires_grad_()
    loss = sparse_divergence(logits, *teacher(logits.detach(), k), direction)
    loss.sum().backward()
    assert loss.abs().max() < 1e-14
    assert logits.grad.abs().max() < 1e-14


@both
def test_fused_student_equal_to_teacher_has_no_loss_and_no_gradient(direction: str) -> None:
    hidden, weight, bias = (value.requires_grad_() for value in student())
    target = ragged(*teacher((hidden @ weight.T + bias).detach(), K))
    total, rows = linear_sparse_divergence(hidden, weight, *target, direction, bias=bias)
    total.backward()
    assert rows.abs().max() < 1e-14
    assert all(value.grad.abs().max() < 1e-13 for value in (hidden, weight, bias))


@both
def test_loss_grows_with_k_from_zero_to_the_full_kl(direction: str) -> None:
    for seed in range(20):
        logits, base = logits_of(seed), logits_of(seed + 50)
        full = full_kl(logits, base, direction)
        last = torch.zeros(N, dtype=torch.float64)
        for k in (1, 3, K, 20, V - 1, V):
            loss = sparse_divergence(logits, *teacher(base, k), direction)
            assert (loss >= last - 1e-12).all()  # a finer partition has at least as much KL
            assert (loss <= full + 1e-12).all()
            last = loss
        torch.testing.assert_close(last, full, rtol=1e-12, atol=1e-12)


@both
def test_order_of_entries_does_not_matter(direction: str) -> None:
    hidden, weight, bias = student()
    ids, logprobs, tail = ragged(*teacher(logits_of(1), K))
    order = torch.randperm(K)
    expected = sparse_divergence(hidden @ weight.T + bias, ids, logprobs, tail, direction)
    shuffled = (ids[:, order], logprobs[:, order], tail)
    _, rows = linear_sparse_divergence(hidden, weight, *shuffled, direction, bias=bias)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-13)
    again = sparse_divergence(hidden @ weight.T + bias, *shuffled, direction)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-13)


@both
@pytest.mark.parametrize(("scale", "cap"), [(0.5, None), (1.0, 1.5), (2.0, 3.0)])
def test_scaled_and_capped_logits(direction: str, scale: float, cap: float | None) -> None:
    values = student()
    target, labels = ragged(*teacher(logits_of(1)[4:], K)), torch.tensor([3, 0, 40, 3])
    weights = torch.rand(N, dtype=torch.float64)

    hidden, weight, bias = (value.clone().requires_grad_() for value in values)
    logits = scale * (hidden @ weight.T + bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = torch.cat(
        [
            F.cross_entropy(logits[:4], labels, reduction="none"),
            sparse_divergence(logits[4:], *target, direction),
        ]
    )
    (weights * expected).sum().backward()
    grads = [hidden.grad, weight.grad, bias.grad]

    hidden, weight, bias = (value.clone().requires_grad_() for value in values)
    total, rows = linear_sparse_divergence(
        hidden, weight, *target, direction, labels=labels, row_weights=weights, bias=bias,
        logit_scale=scale, soft_cap=cap, chunk_rows=4,
    )  # fmt: skip
    total.backward()
    torch.testing.assert_close(rows, expected.detach(), rtol=0, atol=1e-13)
    for value, grad in zip((hidden, weight, bias), grads, strict=True):
        torch.testing.assert_close(value.grad, grad, rtol=0, atol=1e-13)


@both
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("k", [1, K, V])
def test_fused_equals_reference_with_gradients(direction: str, chunk_rows: int, k: int) -> None:
    values = student()
    target = ragged(*teacher(logits_of(1)[4:], k))
    labels = torch.tensor([3, 0, 40, 3])
    row_weights = torch.rand(N, dtype=torch.float64)

    hidden, weight, bias = (value.clone().requires_grad_() for value in values)
    logits = hidden @ weight.T + bias
    expected = torch.cat(
        [
            F.cross_entropy(logits[:4], labels, reduction="none"),
            sparse_divergence(logits[4:], *target, direction),
        ]
    )
    (3 * (row_weights * expected).sum()).backward()
    grads = [hidden.grad, weight.grad, bias.grad]

    hidden, weight, bias = (value.clone().requires_grad_() for value in values)
    total, rows = linear_sparse_divergence(
        hidden,
        weight,
        *target,
        direction,
        labels=labels,
        row_weights=row_weights,
        bias=bias,
        chunk_rows=chunk_rows,
    )
    (3 * total).backward()
    torch.testing.assert_close(rows, expected.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(total, (row_weights * expected).sum(), rtol=0, atol=1e-13)
    for found, wanted in zip([hidden.grad, weight.grad, bias.grad], grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


@both
def test_gradient_equals_finite_differences(direction: str) -> None:
    hidden, weight, bias = (value.requires_grad_() for value in student())
    target = ragged(*teacher(logits_of(1), K))

    def total() -> Tensor:
        return linear_sparse_divergence(hidden, weight, *target, direction, bias=bias)[0]

    total().backward()
    step = 1e-6
    for value in (hidden, weight, bias):
        flat, grad = value.data.view(-1), value.grad.view(-1)
        for at in range(0, len(flat), 11):
            before = flat[at].item()
            flat[at] = before + step
            above = total().item()
            flat[at] = before - step
            below = total().item()
            flat[at] = before
            assert grad[at].item() == pytest.approx((above - below) / (2 * step), abs=1e-7)


def test_reference_passes_gradcheck() -> None:
    target = ragged(*teacher(logits_of(1), K))
    for direction in DIRECTIONS:
        logits = logits_of(2).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z, d=direction: sparse_divergence(z, *target, d), logits
        )


def test_cross_entropy_is_the_forward_form_with_one_certain_entry() -> None:
    logits, labels = logits_of(3), torch.randint(V, (N,))
    certain = torch.zeros(N, 1, dtype=torch.float64)
    none = torch.full((N,), -torch.inf, dtype=torch.float64)
    found = sparse_divergence(logits, labels[:, None], certain, none)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="none"))


def test_a_tail_of_zero_contributes_zero() -> None:
    base = logits_of(4)
    ids, logprobs, _ = teacher(base, K)
    logprobs = logprobs.log_softmax(1)  # all mass on K
    none = torch.full((N,), -torch.inf, dtype=torch.float64)
    logits = logits_of(5)
    log_q = logits.log_softmax(1).gather(1, ids)
    expected = (logprobs.exp() * (logprobs - log_q)).sum(1)
    torch.testing.assert_close(sparse_divergence(logits, ids, logprobs, none), expected)
    # In reverse, the student's mass outside K is compared with a floor: a finite, positive loss.
    b = 1 - log_q.exp().sum(1)
    expected = (log_q.exp() * (log_q - logprobs)).sum(1) + b * (b.log() - MIN_TAIL_LOGPROB)
    found = sparse_divergence(logits, ids, logprobs, none, "reverse")
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()
    # The loss is 0 if the student has no mass there either.
    logits = torch.full_like(logits, -1e4).scatter(1, ids, logprobs).requires_grad_()
    loss = sparse_divergence(logits, ids, logprobs, none, "reverse")
    loss.sum().backward()
    assert loss.abs().max() < 1e-14
    assert logits.grad.abs().max() < 1e-14


@both
def test_a_tiny_tail_is_exact_in_float32(direction: str) -> None:
    """1 - Σ q would round to 0 here; the logsumexp of the tail does not."""
    base = torch.zeros(1, V, dtype=torch.float64)
    base[0, 0], base[0, 1] = 20, 18
    other = base.clone()
    other[0, 2:] += torch.linspace(-2, 3, V - 2)
    target = teacher(base, 2)
    expected = sparse_divergence(other, *target, direction)
    identity = torch.eye(V)
    single = (target[0], target[1].float(), target[2].float())
    _, rows = linear_sparse_divergence(other.float(), identity, *single, direction)
    assert expected.item() < 1e-6
    assert rows.item() == pytest.approx(expected.item(), abs=3e-8)
    hidden = other.float().requires_grad_()
    linear_sparse_divergence(hidden, identity, *single, direction)[0].backward()
    logits = other.clone().requires_grad_()
    sparse_divergence(logits, *target, direction).backward()
    tail = slice(2, None)
    torch.testing.assert_close(
        hidden.grad[:, tail].double(), logits.grad[:, tail], rtol=1e-3, atol=0
    )


@both
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_no_worse_than_plain_torch_in_bfloat16(direction: str, autocast: bool) -> None:
    """Errors against float64; those of plain autograd in bfloat16 are the yardstick."""
    torch.manual_seed(0)
    n, v, d = 256, 1000, 64
    hidden64, weight64 = torch.randn(n, d).double(), torch.randn(v, d).double() / math.sqrt(d) * 2
    hidden64, weight64 = (value.bfloat16().double() for value in (hidden64, weight64))
    base = hidden64 @ weight64.T + torch.randn(n, v) * 0.5
    ids, logprobs, tail = teacher(base, 32)
    labels = torch.randint(v, (n // 2,))

    def truth_or_naive(dtype: torch.dtype) -> list[Tensor]:
        hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (hidden64, weight64))
        logits = hidden @ weight.T
        logits = logits if dtype == torch.float64 else logits.float()
        kl = sparse_divergence(
            logits[n // 2 :],
            ids[n // 2 :],
            logprobs[n // 2 :].to(logits.dtype),
            tail[n // 2 :].to(logits.dtype),
            direction,
        )
        total = F.cross_entropy(logits[: n // 2], labels, reduction="sum") + kl.sum()
        (total / n).backward()
        return [total.detach(), hidden.grad, weight.grad]

    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (hidden64, weight64))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, rows = linear_sparse_divergence(
            hidden,
            weight,
            ids[n // 2 :],
            logprobs[n // 2 :].float(),
            tail[n // 2 :].float(),
            direction,
            labels=labels,
            row_weights=torch.full((n,), 1 / n),
            chunk_rows=50,
        )
    total.backward()
    assert rows.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == dtype

    def error(found: Tensor, wanted: Tensor) -> float:
        return ((found.double() - wanted).norm() / wanted.norm()).item()

    truth, naive = truth_or_naive(torch.float64), truth_or_naive(torch.bfloat16)
    for name, found, exact, plain in zip(
        ["loss", "hidden", "weight"],
        [rows.sum(), hidden.grad, weight.grad],
        truth,
        naive,
        strict=True,
    ):
        assert error(found, exact) <= 1.05 * error(plain, exact) + 1e-5, name


def test_frozen_head_and_no_grad_hold_no_gradients() -> None:
    hidden, weight, _ = student()
    target = teacher(logits_of(1), K)
    total, _ = linear_sparse_divergence(hidden.requires_grad_(), weight, *target)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        total, _ = linear_sparse_divergence(hidden, weight.requires_grad_(), *target)
    assert not total.requires_grad


def test_empty_parts() -> None:
    hidden, weight, _ = student()
    weight.requires_grad_()
    labels = torch.randint(V, (N,))
    nothing = torch.zeros(0, K)
    target = (nothing.long(), nothing, nothing[:, 0])
    total, rows = linear_sparse_divergence(hidden, weight, *target, labels=labels)
    torch.testing.assert_close(total, F.cross_entropy(hidden @ weight.T, labels, reduction="sum"))
    assert len(rows) == N
    total, rows = linear_sparse_divergence(hidden[:0], weight, *target)
    total.backward()
    assert total == 0
    assert (weight.grad == 0).all()


def test_int32_ids_give_the_same_losses() -> None:
    hidden, weight, _ = student()
    ids, logprobs, tail = teacher(logits_of(1), K)
    expected = linear_sparse_divergence(hidden, weight, ids, logprobs, tail)[1]
    found = linear_sparse_divergence(hidden, weight, ids.int(), logprobs, tail)[1]
    assert (found == expected).all()


def test_errors_name_wrong_arguments() -> None:
    hidden, weight, _ = student()
    target = teacher(logits_of(1), K)
    with pytest.raises(ValueError, match="'sideways'"):
        linear_sparse_divergence(hidden, weight, *target, "sideways")
    with pytest.raises(ValueError, match=r"expected hidden \[13, 7\]"):
        linear_sparse_divergence(hidden[1:], weight, *target)
    with pytest.raises(ValueError, match="use bfloat16"):
        linear_sparse_divergence(hidden.half(), weight.half(), *target)


def test_gradients_can_be_taken_only_once() -> None:
    hidden, weight, _ = student()
    total, _ = linear_sparse_divergence(hidden.requires_grad_(), weight, *teacher(logits_of(1), K))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        total.backward()


def over_outcomes(
    logits: torch.Tensor, p: torch.Tensor, ids: torch.Tensor, direction: str
) -> torch.Tensor:
    """The divergence from its definition, on the kept ids and one outcome for all the others."""
    q = logits.softmax(1)
    rows = []
    for row in range(len(q)):
        kept = ids[row].tolist()
        others = [at for at in range(q.shape[1]) if at not in kept]
        a = sum((p[row, at] for at in others if at < p.shape[1]), torch.zeros(()).double())
        one = torch.stack([*(p[row, at] for at in kept), a])
        two = torch.stack([*(q[row, at] for at in kept), q[row, others].sum()])
        if direction == "forward":
            rows.append(torch.special.xlogy(one, one).sum() - torch.special.xlogy(one, two).sum())
        else:
            floor = one.clamp(min=math.exp(MIN_TAIL_LOGPROB))
            rows.append((two * (two / floor).log()).sum())
    return torch.stack(rows)


@both
@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("extra", [-40.0, -2.0, 3.0])
def test_a_wider_head_has_its_extra_columns_in_the_tail(
    direction: str, k: int, extra: float
) -> None:
    """Padding (-40), added tokens and likely ones; k = 12 keeps all of the teacher's ids."""
    torch.manual_seed(0)
    base = torch.randn(6, 12).double() * 2
    ids, logprobs, tail = teacher(base, k)
    hidden, weight = torch.randn(6, 7).double(), torch.randn(17, 7).double()
    bias = torch.cat([torch.zeros(12), torch.full((5,), extra)]).double()
    for each in (hidden, weight, bias):
        each.requires_grad_()
    expected = over_outcomes(hidden @ weight.T + bias, base.softmax(1), ids, direction)
    wanted = torch.autograd.grad(expected.sum(), [hidden, weight, bias])
    reference = sparse_divergence(hidden @ weight.T + bias, ids, logprobs, tail, direction)
    torch.testing.assert_close(reference, expected, rtol=1e-11, atol=1e-12)
    fused, losses = linear_sparse_divergence(
        hidden, weight, ids, logprobs, tail, direction, bias=bias
    )
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-11, atol=1e-12)
    fused.backward()
    for each, gradient in zip((hidden, weight, bias), wanted, strict=True):
        torch.testing.assert_close(each.grad, gradient, rtol=1e-9, atol=1e-11)


@both
def test_padding_without_mass_changes_nothing(direction: str) -> None:
    torch.manual_seed(1)
    base, logits = torch.randn(6, 12).double(), torch.randn(6, 12).double()
    targets = teacher(base, 5)
    padded = torch.cat([logits, torch.full((6, 4), -800.0).double()], 1)
    torch.testing.assert_close(
        sparse_divergence(padded, *targets, direction),
        sparse_divergence(logits, *targets, direction),
        rtol=1e-13, atol=1e-14,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "rows", "most"), [(0, 10, 4), (5, 7, 3), (9, 0, 100), (0, 0, 4)]
)
def test_chunks_are_equal_and_hold_each_row_once(labels: int, rows: int, most: int) -> None:
    ids = torch.zeros(rows, 2, dtype=torch.long)
    targets = torch.zeros(labels), ids, ids.float(), torch.zeros(rows), "forward"
    found = [part for part, *_ in _chunks(*targets, most)]  # type: ignore[arg-type]
    assert [at for part in found for at in range(part.start, part.stop)] == list(
        range(labels + rows)
    )
    for parts in (found[: -(-labels // most)], found[-(-labels // most) :]):
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes, default=0) <= most
        assert max(sizes, default=0) - min(sizes, default=0) < max(1, len(sizes))
