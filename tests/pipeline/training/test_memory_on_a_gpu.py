"""The loss's memory on a GPU, at the sizes of large models: fake tensors need none themselves."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pipeline import losses_triton
from pipeline.losses import linear_sparse_divergence
from pipeline.training import memory
from tests.helpers.fake_cuda import FakeRows, Memory, fake_cuda

K = 64


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [(8192, 4096, 151_936), (8192, 4096, 128_256), (4096, 1024, 50_257), (64, 1024, 151_936)],
)
def test_estimate_is_the_peak(
    rows: int, width: int, vocabulary: int, bf16: bool, trained: bool
) -> None:
    """The forward computes the gradients, so its peak is that of the loss."""
    with fake_cuda() as mode:
        mode.memory = Memory()
        hidden = torch.empty(rows, width, device="cuda", requires_grad=True)
        weight = torch.empty(vocabulary, width, device="cuda", requires_grad=trained)
        ids = torch.empty(rows, K, dtype=torch.int64, device="cuda")
        logprobs, tail = torch.empty(rows, K, device="cuda"), torch.empty(rows, device="cuda")
        before = mode.memory.now()
        with (
            patch.object(losses_triton, "_rows", FakeRows(losses_triton._rows, mode)),
            torch.autocast("cuda", torch.bfloat16, enabled=bf16),
        ):
            linear_sparse_divergence(hidden, weight, ids, logprobs, tail)
        peak = mode.memory.peak - before
    args: Any = SimpleNamespace(device=torch.device("cuda", 0), bf16=bf16)
    estimate = memory.loss_bytes(args, rows, vocabulary, width, trained)
    assert peak <= 1.01 * estimate
    assert estimate <= 1.1 * peak
