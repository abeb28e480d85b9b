"""The kernel against the step in plain torch, on a CPU, in Triton's interpreter.

test_losses_triton.py runs these in a process where TRITON_INTERPRET=1 is set before Triton loads.
"""

import pytest
import torch
from torch import Tensor

from pipeline import losses
from pipeline import losses_triton as kernel
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


def test_ids_outside_the_vocabulary_touch_nothing() -> None:
    """Whatever a caller failed to check: the row says NaN, and its neighbours are as without it."""
    logits, (ids, logprobs, tail), weights = case(41, K)
    memory = torch.full(((N + 2) * 41,), 7.0)  # somebody else's numbers before and behind
    z = memory[41:-41].view(N, 41)
    z.copy_(logits)
    bad = ids.clone()
    bad[1, 0], bad[4, 0], bad[N - 1, 0] = -3, 1 << 40, 41
    found = kernel.step(
        z, z, bad, logprobs, tail, weights, False, 0.0, losses.MIN_TAIL_LOGPROB
    )  # fmt: skip
    assert found.isnan().nonzero()[:, 0].tolist() == [1, 4, N - 1]
    assert (memory[:41] == 7).all()
    assert (memory[-41:] == 7).all()
    work = logits.float()
    expected = kernel.step(
        work, work, ids, logprobs, tail, weights, False, 0.0, losses.MIN_TAIL_LOGPROB
    )  # fmt: skip
    good = [0, 2, 3, 5, 6, 7]
    torch.testing.assert_close(found[good], expected[good])
    torch.testing.assert_close(z[good], work[good])
