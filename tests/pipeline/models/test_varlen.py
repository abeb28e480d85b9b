"""All sequences of a row in one kernel: the same numbers and gradients as each by itself.

A CPU has no such kernel, so the reference of the same interface takes its place.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models import varlen
from pipeline.models.attention import PACKED, Way, packing_arguments, take_way
from pipeline.models.packed_attention import packed_attention
from tests.helpers.architectures import tiny
from tests.helpers.fake_cuda import fake_cuda

LENGTHS = [1, 9, 2, 5, 1]


class Kernel:
    """The reference in the kernel's place; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        for part in arguments[:3]:
            assert part.stride(-1) == 1, "the kernel wants the numbers of a head side by side"
        return varlen.reference(*arguments, **options)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(varlen, "kernel", made)
    monkeypatch.setattr(varlen, "fits", lambda *_: True)
    return made


def layer(groups: int, **attributes: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def arguments(heads: int, groups: int, lengths: list[int]) -> list[Tensor]:
    torch.manual_seed(0)
    tokens = sum(lengths)
    return [
        torch.randn(1, tokens, number, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for number in (heads, heads // groups, heads // groups)
    ]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_kernel_equals_each_by_itself(
    monkeypatch: pytest.MonkeyPatch,
    grouped: bool,
    groups: int,
    window: int | None,
    scaling: float | None,
) -> None:
    module, mask = layer(groups), None if window is None else torch.tensor(window)
    apart, together = (arguments(4, groups, LENGTHS) for _ in range(2))
    expected, _ = packed_attention(module, *apart, mask, LENGTHS, scaling=scaling)
    made = Kernel()
    monkeypatch.setattr(varlen, "kernel", made)
    monkeypatch.setattr(varlen, "GROUPED", grouped)
    monkeypatch.setattr(varlen, "fits", lambda *_: True)
    found, _ = packed_attention(module, *together, mask, LENGTHS, scaling=scaling)
    assert made.calls == 1
    assert found.shape == expected.shape == (1, sum(LENGTHS), 4, 8)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(expected)
    (expected * probe).sum().backward()
    (found * probe).sum().backward()
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_a_model_keeps_its_logits_and_gradients(kind: str, kernel: Kernel) -> None:
    """mistral has a sliding window."""
    ids = (torch.arange(sum(LENGTHS)) * 37 + 5) % 512
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    results = []
    for way in (Way("eager"), Way(PACKED)):
        model = tiny(kind).double()
        take_way(model, way)
        if way.attention == PACKED:
            rows = [(ids, positions, LENGTHS)]
        else:
            parts = zip(ids.split(LENGTHS), positions.split(LENGTHS), strict=True)
            rows = [(one, at, [len(one)]) for one, at in parts]
        logits = [
            model(
                input_ids=one[None],
                position_ids=at[None],
                use_cache=False,
                **packing_arguments(model, lengths),
            ).logits[0]
            for one, at, lengths in rows
        ]
        torch.cat(logits).logsumexp(-1).sum().backward()
        results.append([torch.cat(logits), *(weight.grad for weight in model.parameters())])
    assert kernel.calls == model.config.num_hidden_layers
    for eager, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, eager, rtol=1e-4, atol=1e-5)  # softmax is float32


def test_launches_do_not_depend_on_the_number_of_sequences(kernel: Kernel) -> None:
    class Launches(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.number += 1
            return func(*args, **(kwargs or {}))

    found = []
    for lengths in ([24], [12] * 2, [1] * 24):
        given = arguments(4, 2, lengths)
        with Launches() as launches:
            packed_attention(layer(2), *given, None, lengths)[0].sum().backward()
        found.append(launches.number)
    assert found[0] == found[1] == found[2]
    assert kernel.calls == 3


@pytest.mark.parametrize(
    ("lengths", "window", "calls"),
    [
        ([5, 3], None, 1),
        ([5, 4], None, 1),
        ([5, 5], None, 0),
        ([9], None, 0),
        ([9], 9, 0),
        ([9], 8, 1),
    ],
)
def test_long_sequences_have_a_kernel_each(
    monkeypatch: pytest.MonkeyPatch,
    kernel: Kernel,
    lengths: list[int],
    window: int | None,
    calls: int,
) -> None:
    """But not with a window, for which sdpa would take a whole mask."""
    monkeypatch.setattr(varlen, "LONG", 5)
    mask = None if window is None else torch.tensor(window)
    packed_attention(layer(2), *arguments(4, 2, lengths), mask, lengths)
    assert kernel.calls == calls


class OnGpu(Tensor):
    is_cuda = property(lambda _: True)  # type: ignore[assignment]


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype).as_subclass(OnGpu)


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "kernel", varlen.reference)
    monkeypatch.setattr(varlen, "able", lambda _: True)
    shape, fewer = (1, 4, 6, 16), (1, 2, 6, 16)
    q, k = on_gpu(*shape), on_gpu(*fewer)
    assert varlen.fits(q, k, k)
    single = [on_gpu(*one, dtype=torch.float32) for one in (shape, fewer, fewer)]
    assert not varlen.fits(*single)
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen.fits(*single)
        assert varlen.fits(single[0], single[1], k), "as RMSNorm on queries and keys leaves them"
    assert not varlen.fits(q, single[1], k)
    assert not varlen.fits(torch.empty(shape, dtype=torch.bfloat16), k, k)
    for wrong in ((1, 3, 6, 16), (1, 2, 7, 16), (1, 2, 6, 8), (2, 2, 6, 16)):
        assert not varlen.fits(q, on_gpu(*wrong), on_gpu(*wrong))
    assert not varlen.fits(q, k, on_gpu(1, 2, 6, 8))
    assert not varlen.fits(*[on_gpu(2, 4, 6, 16)] * 3)
    for width in (12, 264):
        assert not varlen.fits(*[on_gpu(1, 2, 6, width)] * 3)
    monkeypatch.setattr(varlen, "able", lambda _: False)
    assert not varlen.fits(q, k, k)
    monkeypatch.setattr(varlen, "kernel", None)
    assert not varlen.fits(q, k, k)


def test_autocast_computes_in_its_dtype(kernel: Kernel) -> None:
    given = [x.detach().float() for x in arguments(4, 2, LENGTHS)]
    expected, _ = packed_attention(layer(2), *[x.bfloat16() for x in given], None, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention(layer(2), *given, None, LENGTHS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {"dropout": 0.1}),
        (None, {"is_causal": False}),
        (torch.ones(1, 1, 18, 18, dtype=torch.bool).tril(), {}),
        (None, {"softcap": 30.0}),
    ],
)
def test_what_the_kernel_would_leave_out(
    kernel: Kernel, mask: Tensor | None, options: dict[str, Any]
) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

    module = Gemma2Attention.__new__(Gemma2Attention)
    torch.nn.Module.__init__(module)
    module.num_key_value_groups, module.head_dim = 2, 8
    packed_attention(module, *arguments(4, 2, LENGTHS), mask, LENGTHS, scaling=1.0, **options)
    assert kernel.calls == 0


@pytest.mark.skipif(varlen.kernel is None, reason="torch has no variable-length attention")
@pytest.mark.parametrize("window", [None, 3])
def test_the_host_does_not_wait_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """torch's own kernel on fake tensors of a GPU, forward and backward."""
    monkeypatch.setattr(varlen, "able", lambda _: True)
    mask = None if window is None else torch.tensor(window)
    with fake_cuda() as mode:
        q, k, v = (
            torch.empty(1, heads, sum(LENGTHS), 16, dtype=torch.bfloat16, device="cuda")
            for heads in (4, 2, 2)
        )
        q.requires_grad_()
        found, _ = packed_attention(layer(2), q, k, v, mask, LENGTHS)
        assert found.shape == (1, sum(LENGTHS), 4, 16)
        assert found.device.type == "cuda"
        assert "_varlen_attn" in str(found.grad_fn.next_functions)
        found.sum().backward()
        assert q.grad is not None
        assert q.grad.shape == q.shape
        assert mode.waits == []
        assert len(mode.pinned) == 1
