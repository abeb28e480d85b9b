"""The kernel: interpreted on a CPU against plain torch; its launches, on fake tensors of a GPU.

test_gpu_compile.py compiles it.
"""

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

from pipeline import losses, losses_triton
from tests.helpers.fake_cuda import FakeRows, fake_cuda
from tests.helpers.paths import ROOT


def test_interpreted_kernel_equals_plain_torch() -> None:
    checks = ROOT / "tests" / "helpers" / "triton_checks.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("direction", "k", "device"),
    [("forward", 0, "cuda:0"), ("reverse", 3, "cuda:1"), ("forward", 128, "cuda:1")],
)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(FP32, True), (FP32, False), (BF16, True), (BF16, False), (FP64, False)]
)
def test_fused_loss_on_a_gpu(
    direction: losses.Direction, k: int, device: str, dtype: torch.dtype, autocast: bool
) -> None:
    """Devices, dtypes and shapes fit, from the inputs to the gradients, and the host never waits.

    float64 takes the steps in plain torch.
    """
    rows, labels, width, vocab, chunk = 13, 6, 16, 50, 4
    given = {"dtype": dtype, "device": device, "requires_grad": True}
    with fake_cuda() as mode:
        launches = FakeRows(losses_triton._rows, mode)
        hidden, weight = torch.empty(rows, width, **given), torch.empty(vocab, width, **given)
        bias = torch.empty(vocab, **given)
        targets = (
            torch.empty(rows - labels, k, dtype=torch.int32, device=device),
            torch.empty(rows - labels, k, device=device),
            torch.empty(rows - labels, device=device),
        )
        with (
            patch.object(losses_triton, "_rows", launches),
            torch.autocast("cuda", BF16, enabled=autocast),
        ):
            total, each = losses.linear_sparse_divergence(
                hidden, weight, *targets, direction, bias=bias, logit_scale=0.5, soft_cap=30.0,
                labels=torch.empty(labels, dtype=torch.int64, device=device), chunk_rows=chunk,
            )  # fmt: skip
        total.backward()
    assert each.shape == (rows,)
    assert len(launches.launches) == (0 if dtype == FP64 else 4)
    for parameter in (hidden, weight, bias):
        assert parameter.grad.dtype == dtype
        assert parameter.grad.device == torch.device(device)
    assert mode.waits == []


def test_gaps_within_a_row_are_refused() -> None:
    z, empty = torch.zeros(4, 6)[:, ::2], torch.zeros(4, 1)
    for matrices in [(z, z), (z, None), (z.contiguous(), z)]:
        with pytest.raises(ValueError, match="side by side"):
            losses_triton.step(*matrices, empty.long(), empty, empty, empty, False, 0.0, -30.0)
