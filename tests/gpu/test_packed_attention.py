"""Sequences of a packed row against each of them alone, by the model's own eager attention."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models import varlen
from pipeline.models.attention import (
    PACKED,
    PACKED_EAGER,
    Way,
    enable_packing,
    packing_arguments,
    take_way,
)
from pipeline.models.packed_attention import packed_attention
from tests.gpu.device import DEVICE, REHEARSED
from tests.gpu.measured import Measured
from tests.helpers.architectures import logits_alone, tiny

pytestmark = pytest.mark.gpu

LENGTHS = [1, 2, 37, 130, 64, 9] if REHEARSED else [1, 2, 700, 129, 64, 257, 128, 1025]
WIDER = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64, "num_key_value_heads": 2}
OWN_ROWS = "rows of their own"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("qwen3", WIDER),
    "one group": ("llama", WIDER | {"num_key_value_heads": 8}),
    "window of 4": ("mistral", {"sliding_window": 4}),
    "window of 128": ("mistral", WIDER | {"sliding_window": 128}),
    "soft cap and window": ("gemma2", WIDER | {"sliding_window": 33}),
    "sinks, experts": ("gpt_oss", {"sliding_window": 4, "num_experts_per_tok": 4}),
    "window, no positions": ("cohere2", WIDER | {"sliding_window": 64}),
    OWN_ROWS: ("lfm2", {}),
}
"""All experts of a token are asked: a choice among them could turn with a rounding."""
EAGER = {kind for kind, (name, _) in KINDS.items() if name in ("gemma2", "gpt_oss")}
"""Models whose attention sdpa does not know whole."""
SEPARATE = "sequence by sequence"
WAYS = ["chosen", SEPARATE, "own eager"]
"""chosen: in bfloat16 one kernel attends all sequences of a row, where the model's attention is
plain."""
TIMES = 2
"""Two orders of the same sums: each may have the rounding error of the other, and they may add."""
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 0.0}
"""Of the size of logits or gradients: models take some sums, such as the softmax, in float32 even
in float64, so a smaller error than that is not seen in the reference."""


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """Grows by one with each call of the module's function."""
    calls: list[None] = []
    function = getattr(module, name)

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counting)
    return calls


def model_of(kind: str, dtype: torch.dtype, attention: str = "eager") -> PreTrainedModel:
    """The same weights, rounded to bfloat16, in each dtype."""
    name, changes = KINDS[kind]
    model = tiny(name, **({"initializer_range": 0.08} if changes else {}), **changes)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(attention)
    moved: PreTrainedModel = model.to(torch.bfloat16).to(DEVICE, dtype)
    return moved


def ids() -> Tensor:
    return ((torch.arange(sum(LENGTHS)) * 37 + 5) % 512).to(DEVICE)


def packed(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(DEVICE)
    logits: Tensor = model(
        input_ids=tokens[None], position_ids=positions, use_cache=False,
        **packing_arguments(model, LENGTHS),
    ).logits[0]  # fmt: skip
    return logits


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """Size of the difference, as a share of the size of what is expected."""
    pairs = list(zip(found, expected, strict=True))
    differences = torch.stack([(one.double() - other.double()).norm() for one, other in pairs])
    sizes = torch.stack([other.double().norm() for _, other in pairs])
    return float(differences.norm() / sizes.norm())


def results(model: PreTrainedModel, logits: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Logits, and the gradients of a weighted sum of them."""
    weights = torch.linspace(-1, 1, logits.numel(), device=DEVICE).reshape(logits.shape)
    (logits * weights.to(logits.dtype)).sum().backward()
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in model.parameters()
    ]
    return [logits.detach()], gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone(
    kind: str, way: str, dtype: torch.dtype, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and gradients are as near to float64's as those of each sequence alone."""
    calls = counted(monkeypatch, varlen, "attend")
    if way == SEPARATE:
        monkeypatch.setattr(varlen, "fits", lambda *_: False)
    exact, plain = model_of(kind, torch.float64), model_of(kind, dtype)
    model = model_of(kind, dtype, "sdpa") if kind not in EAGER else model_of(kind, dtype)
    if way == "own eager" and kind != OWN_ROWS:
        take_way(model, Way(PACKED_EAGER))
    else:
        enable_packing(model)
    tokens = ids()
    truth = results(exact, logits_alone(exact, tokens, LENGTHS))
    naive = results(plain, logits_alone(plain, tokens, LENGTHS))
    calls.clear()
    found = results(model, packed(model, tokens))
    one_kernel = way == "chosen" and dtype == torch.bfloat16 and kind not in EAGER | {OWN_ROWS}
    expected = model.config.num_hidden_layers * (one_kernel and DEVICE == "cuda")
    measured("layers in one kernel", len(calls), expected, least=expected)
    parts = zip(("logits", "gradients"), found, naive, truth, strict=True)
    for name, one, other, exactly in parts:
        alone = off(other, exactly)
        measured(f"{name} off by", off(one, exactly), TIMES * alone + FLOOR[dtype])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != OWN_ROWS])
def test_no_sequence_sees_another(kind: str, measured: Measured) -> None:
    """Other tokens in one sequence leave the others' logits bit for bit as they are."""
    model = model_of(kind, torch.bfloat16, "eager" if kind in EAGER else "sdpa")
    enable_packing(model)
    assert model.config._attn_implementation in (PACKED, PACKED_EAGER)
    tokens, at = ids(), 3
    start = sum(LENGTHS[:at])
    inside = torch.zeros(len(tokens), dtype=torch.bool, device=DEVICE)
    inside[start : start + LENGTHS[at]] = True
    with torch.no_grad():
        before = packed(model, tokens)
        after = packed(model, torch.where(inside, (tokens + 11) % 512, tokens))
    changed = (before != after).any(1)
    measured("positions of others that changed", changed[~inside].sum(), 0)
    measured("of its own", changed[inside].float().mean(), least=0.99, unit="of 1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 512], ids=["causal", "window of 512"])
def test_no_scores_are_kept(window: int | None, dtype: torch.dtype, measured: Measured) -> None:
    """Forward and backward of grouped queries take far less memory than T × T scores of each head.

    A mask of a window is T × T once, for all heads, as numbers and as bits."""
    heads, groups, tokens, width = 16, 4, 256 if REHEARSED else 4096, 64
    layer = torch.nn.Module()
    layer.num_key_value_groups = groups  # type: ignore[assignment]
    query, key, value = (
        torch.randn(1, many, tokens, width, device=DEVICE, dtype=dtype).requires_grad_()
        for many in (heads, heads // groups, heads // groups)
    )
    mask = None if window is None else torch.tensor(window)
    before = reset_peak()
    found, _ = packed_attention(layer, query, key, value, mask, [tokens])
    found.sum().backward()
    assert query.grad is not None
    if DEVICE == "cpu":
        pytest.skip("the peak is that of CUDA's allocator")
    scores = heads * tokens**2 * query.element_size()
    peak = torch.cuda.max_memory_allocated() - before
    measured("peak", peak / 2**20, unit="MiB")
    measured("peak / scores", peak / scores, 0.5)


def reset_peak() -> int:
    """Bytes that are there."""
    if DEVICE == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
