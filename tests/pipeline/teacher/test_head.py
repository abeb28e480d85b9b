"""Top-k and tail of logits, by the way of a CPU and that of a GPU, against float64."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.teacher import head
from tests.helpers.paths import ROOT

Way = Callable[[Tensor, int], head.TopRest]
WAYS: dict[str, Way] = {
    "of a CPU": head.top_and_rest,
    "of a GPU": head.one_pass,
    "of a GPU, groups of 64": lambda logits, k: head.one_pass(logits, k, 64),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@each_way
@pytest.mark.parametrize("size", [5, 64, 1000, 4099, 33_000])
@pytest.mark.parametrize("k", [1, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(way: Way, size: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size + k)
    logits = (torch.randn(7, size) * 4).to(dtype)
    logits[0, : size // 2] = 80  # a row of ties, and a tail far below the head
    logits[1, 0] = 200
    exact, given = logits.double(), logits.clone()
    best, ids, rest = way(given, k)
    wanted = exact.topk(min(k, size)).values
    assert best.dtype == rest.dtype == torch.float32
    torch.testing.assert_close(best.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(exact.gather(1, ids), wanted)
    assert all(len(set(row.tolist())) == min(k, size) for row in ids)
    others = exact.scatter(1, ids, -torch.inf)
    torch.testing.assert_close(rest.double(), others.logsumexp(-1), rtol=1e-6, atol=1e-5)
    if dtype == torch.float32 and k < size:  # what samples are drawn from
        assert torch.equal(given.double(), others)


@each_way
def test_rows_within_a_wider_tensor(way: Way) -> None:
    """A rank's columns without their padding."""
    torch.manual_seed(0)
    wide = torch.randn(3, 3000)
    wide[:, 2900:] = 99
    alone = way(wide[:, :2900].clone(), 4)
    for found, wanted in zip(way(wide[:, :2900], 4), alone, strict=True):
        torch.testing.assert_close(found, wanted)


@each_way
def test_columns_of_minus_infinity_have_no_mass(way: Way) -> None:
    logits = torch.full((2, 3000), -torch.inf)
    logits[:, 7], logits[:, 2999] = 1.0, 2.0
    best, ids, rest = way(logits.clone(), 2)
    assert ids.tolist() == [[2999, 7]] * 2
    assert best.tolist() == [[2.0, 1.0]] * 2
    assert torch.isneginf(rest).all()
    _, ids, rest = way(logits, 9)
    assert all(len(set(row.tolist())) == 9 for row in ids)
    assert torch.isneginf(rest).all()


@each_way
@pytest.mark.parametrize("at", [0, 1234, 2999])
def test_nan_stays_nan(way: Way, at: int) -> None:
    logits = torch.randn(3, 3000)
    logits[1, at] = torch.nan
    best, _, rest = way(logits, 4)
    assert torch.isnan(best[1]).any() or torch.isnan(rest[1])
    assert torch.isfinite(best[0]).all()


def test_the_gpu_reads_the_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows `groups_of` takes no more than a share of the logits' elements."""
    logits = torch.randn(2, 64_000)
    groups = head.groups_of(logits, 64_000 // head.GROUP_CUDA, head.GROUP_CUDA)
    monkeypatch.setattr(head, "groups_of", lambda *_: groups)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple) else (made,):
                if isinstance(one, Tensor) and one.data_ptr() != logits.data_ptr():
                    self.most = max(self.most, one.numel())
            return made

    with Sizes() as sizes:
        head.one_pass(logits, 16)
    assert 0 < sizes.most <= logits.numel() / 8


def test_interpreted_kernel_equals_plain_torch() -> None:
    checks = ROOT / "tests" / "helpers" / "triton_head_checks.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("members", [8, 16, 64])
def test_kernel_compiles_without_a_gpu(members: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pipeline.teacher.head_triton import TILE, _groups

    kinds = ["*fp32", "*fp32", "*fp32", "i32", "i32", "constexpr", "constexpr"]
    signature = dict(zip(_groups.arg_names, kinds, strict=True))
    settings = {"MEMBERS": members, "SIZE": TILE // members}
    source = ASTSource(_groups, signature, constexprs=settings)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(made.asm["cubin"]) > 1000


def test_no_other_package_than_torch_is_needed() -> None:
    """So the head step runs and is measured where vLLM is not."""
    code = (
        "import sys; import pipeline.teacher.head; "
        "print([name for name in ('vllm', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
