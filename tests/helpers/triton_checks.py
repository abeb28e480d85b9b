"""The kernel against the step in plain torch, on a CPU, in Triton's interpreter.

test_losses_triton.py runs these in a process where TRITON_INTERPRET=1 is set before Triton loads.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import losses
from pipeline import losses_triton as kernel
from tests.helpers.canaries import Guarded, guarding
from tests.helpers.losses import both, ragged, teacher

N, K = 9, 5


def case(size: int, k: int, seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Logits [N, size], ragged targets of up to k entries, row weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(N, size, generator=generator, dtype=torch.float64)
    base = 3 * torch.randn(N, size, generator=generator, dtype=torch.float64)
    return logits, ragged(*teacher(base, k)), torch.rand(N, generator=generator).double()


@both
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize(("size", "k"), [(41, K), (41, 41), (41, 1), (5000, 64)])
def test_equals_plain_torch(direction: str, cap: float, size: int, k: int) -> None:
    logits, (ids, logprobs, tail), weights = case(size, k)
    z = logits.clone()
    expected = losses._step_(z, z, ids, logprobs, tail, weights, direction, cap)
    for dtype, tolerance in [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)]:
        work, grad = logits.float(), torch.empty(N, size, dtype=dtype)
        found = kernel.step(
            work, grad, ids, logprobs, tail, weights, direction == "reverse", cap,
            losses.MIN_TAIL_LOGPROB,
        )  # fmt: skip
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(grad.double(), z, rtol=tolerance, atol=2e-6)
    work = logits.float()  # the gradient overwrites the logits
    kernel.step(
        work, work, ids, logprobs, tail, weights, direction == "reverse", cap,
        losses.MIN_TAIL_LOGPROB,
    )  # fmt: skip
    torch.testing.assert_close(work.double(), z, rtol=2e-6, atol=2e-6)


def test_cross_entropy_and_no_gradient() -> None:
    logits, _, weights = case(300, 1)
    labels = torch.arange(N)[:, None]
    certain, none = torch.zeros(N, 1), torch.full((N,), -torch.inf)
    found = kernel.step(logits.float(), None, labels, certain, none, weights, False, 0.0, -30.0)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


OUTSIDE = (-1, -(1 << 63), 0, 1, 1 << 31, (1 << 63) - 1)
"""Ids outside the vocabulary; those that are not negative are added to its size, if they can be."""


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_memory_is_touched_but_its_own(data: st.DataObject) -> None:
    """Any shape, any distance between rows, NaN around each row and each buffer, ids of any value:
    the losses and gradients are those of float64, and all else stays as it was.

    A row with an id outside the vocabulary has a loss of NaN; padding may have any id.
    """
    draw = data.draw
    rows, size = draw(st.integers(0, 3)), draw(st.integers(1, 200))
    k = draw(st.one_of(st.integers(0, min(size, 6)), st.just(min(size, 128))))
    block, cap = draw(st.sampled_from([16, 64, 4096])), draw(st.sampled_from([0.0, 5.0]))
    direction = draw(st.sampled_from(["forward", "reverse"]))
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    logits, base = (3 * torch.randn(rows, size, generator=generator).double() for _ in range(2))
    full = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, 0), torch.zeros(rows)
    ids, logprobs, tail = ragged(*teacher(base, k)) if k else full
    weights = torch.rand(rows, generator=generator).double()
    expected = logits.clone()
    losses_of = losses._step_(expected, expected, ids, logprobs, tail, weights, direction, cap)

    bad = draw(st.lists(st.sampled_from(range(rows)), unique=True)) if rows and k else []
    bad = [row for row in bad if logprobs[row, 0] > -torch.inf]
    given_ids = torch.where(logprobs > -torch.inf, ids, draw(st.sampled_from(OUTSIDE)))
    for row in bad:
        id_ = draw(st.sampled_from(OUTSIDE))
        given_ids[row, 0] = id_ if id_ < 0 else min(id_ + size, (1 << 63) - 1)

    gap = st.integers(0, 9)
    z = Guarded(logits.float(), draw(gap), draw(gap))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    kinds = draw(st.sampled_from(["apart", "in place", "none"]))
    apart = Guarded(torch.zeros(rows, size, dtype=dtype), draw(gap), draw(gap))
    grad = {"apart": apart.values, "in place": z.values, "none": None}[kinds]
    others = [Guarded(x, draw(gap)) for x in (given_ids, logprobs.float(), tail.float())]
    others.append(Guarded(weights.float(), draw(gap)))
    before, kernel.BLOCK = kernel.BLOCK, block
    try:
        with guarding() as made:
            found = kernel.step(
                z.values, grad, *(x.values for x in others), direction == "reverse", cap,
                losses.MIN_TAIL_LOGPROB,
            )  # fmt: skip
    finally:
        kernel.BLOCK = before
    assert found.isnan().nonzero()[:, 0].tolist() == sorted(bad)
    good = [row for row in range(rows) if row not in bad]
    torch.testing.assert_close(found[good].double(), losses_of[good], rtol=2e-5, atol=2e-5)
    if grad is not None:
        tolerance = 8e-3 if grad.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            grad[good].double(), expected[good], rtol=tolerance, atol=tolerance / 4
        )
    assert all(x.whole() for x in (z, apart, *others, *made))
    assert all(x.unchanged() for x in others)
    assert kinds == "apart" or apart.unchanged()
