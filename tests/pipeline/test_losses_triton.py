"""The kernel: interpreted on a CPU against plain torch, and compiled for a GPU without one."""

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


def test_interpreted_kernel_equals_plain_torch() -> None:
    checks = ROOT / "tests" / "helpers" / "triton_checks.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_kernel_compiles_without_a_gpu(cap: float) -> None:
    """To machine code for Hopper; only running it needs such a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pipeline.losses_triton import _rows

    pointers = ["*fp32", "*bf16", "*i64", "*fp32", "*fp32", "*fp32", "*fp32"]
    kinds = [*pointers, *["i32"] * 4, *["constexpr"] * 6]
    signature = dict(zip(_rows.arg_names, kinds, strict=True))
    settings = {"MIN_TAIL": -30.0, "REVERSE": True, "GRADIENT": True, "CAP": cap}
    settings |= {"ENTRIES": 64, "SIZE": 4096}
    source = ASTSource(_rows, signature, constexprs=settings)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert len(made.asm["cubin"]) > 1000
