"""The kernels as machine code of three GPUs, which needs none of them."""

import importlib
import sys
from typing import Any

import pytest

from pipeline import losses_triton
from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "scripts" / "benchmarks"))
gpu_compile: Any = importlib.import_module("gpu_compile")


@pytest.mark.slow
@pytest.mark.parametrize("gpu", gpu_compile.GPUS)
def test_no_kernel_spills_and_half_of_a_gpu_is_busy(gpu: int) -> None:
    for launch in gpu_compile.LAUNCHES:
        found = gpu_compile.usage(launch, gpu)
        assert found.spilled == 0, launch.name
        assert found.resident >= 0.5, launch.name


def test_the_table_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_compile.py", "--gpu", "90"])
    launch = gpu_compile.loss_launch("cross-entropy", 1)
    assert launch.constants["SIZE"] == losses_triton.BLOCK
    monkeypatch.setattr(gpu_compile, "LAUNCHES", [launch])
    assert gpu_compile.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("| cross-entropy | sm_90 (H100) | 256 |")
    spills = gpu_compile.Usage(64, 8, 0, 256)
    monkeypatch.setattr(gpu_compile, "usage", lambda *_: spills)
    assert gpu_compile.main() == 1
    assert "| 64 | 8 | 0 | 50% |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("registers", "threads", "share"), [(32, 256, 1.0), (33, 256, 0.75), (64, 256, 0.5)]
)
def test_share_of_threads_that_fit(registers: int, threads: int, share: float) -> None:
    assert gpu_compile.Usage(registers, 0, 0, threads).resident == share
