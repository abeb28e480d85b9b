"""sdpa on a GPU without groups of queries where only torch's plain math would take them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models import varlen
from pipeline.models.packed_attention import packed_attention
from tests.helpers.fake_cuda import fake_cuda

LENGTHS = [3, 1, 5]


def layer(groups: int) -> torch.nn.Module:
    module = torch.nn.Module()
    module.num_key_value_groups = groups  # type: ignore[assignment]
    return module


def given(width: int, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, sum(LENGTHS), width).to(**options) for heads in (4, 2, 2)]


@contextmanager
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bool, bool]]]:
    """(heads of the keys, whether they are groups, whether it is causal) of each call of sdpa."""
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, *more: Any, **options: Any) -> Tensor:
        calls.append((key.shape[1], options.get("enable_gqa", False), options["is_causal"]))
        return plain(query, key, *more, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        yield calls


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, None])
@pytest.mark.parametrize(
    ("dtype", "width", "grouped"),
    [
        (torch.float32, 16, False),
        (torch.float64, 16, False),
        (torch.bfloat16, 16, True),
        (torch.bfloat16, 264, False),
    ],
)
def test_keys_are_repeated_where_no_fast_kernel_takes_groups(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    width: int,
    grouped: bool,
    lengths: list[int] | None,
    causal: bool,
) -> None:
    monkeypatch.setattr(varlen, "able", lambda _: True)
    monkeypatch.setattr(varlen, "kernel", None)  # torch before 2.10
    with fake_cuda(), sdpa_calls(monkeypatch) as calls:
        parts = [
            torch.empty(1, heads, sum(LENGTHS), width, dtype=dtype, device="cuda")
            for heads in (4, 2, 2)
        ]
        found, _ = packed_attention(layer(2), *parts, None, lengths, is_causal=causal)
        assert found.shape == (1, sum(LENGTHS), 4, width)
    expected = [(2, True) if grouped else (4, False)] * (1 if lengths is None else 3)
    assert [call[:2] for call in calls] == expected
    assert calls[0][2] == causal


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_repeated_key_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, scaling: float | None
) -> None:
    """On the CPU, told that it is a GPU without a kernel for groups."""
    plain = given(16)
    expected, _ = packed_attention(layer(2), *plain, None, LENGTHS, scaling=scaling)

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    on_gpu = [x.as_subclass(OnGpu) for x in plain]
    monkeypatch.setattr(varlen, "fits", lambda *_: False)
    with sdpa_calls(monkeypatch) as calls:
        found, _ = packed_attention(layer(2), *on_gpu, None, LENGTHS, scaling=scaling)
    assert {heads for heads, *_ in calls} == {4}
    torch.testing.assert_close(found.as_subclass(Tensor), expected, rtol=0, atol=1e-6)
