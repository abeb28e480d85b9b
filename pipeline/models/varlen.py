"""Attention of all sequences of a packed row in one kernel, on a GPU.

torch's variable-length attention (FlashAttention 2) reads where each sequence ends, so a layer
launches the same few kernels for any number of sequences. It takes bfloat16 and float16; elsewhere,
and where the sequences of a row are long, `packed_attention` attends each by itself.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline.devices import to_device

try:
    from torch.nn.attention.varlen import varlen_attn as kernel
except ImportError:  # before torch 2.10
    kernel = None  # type: ignore[assignment]

HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
LONG = 1024
"""Tokens of a sequence, on average, from which on sdpa's own kernels for each are faster.

Forward and backward of 8,192 tokens, 32 heads of 128, on an H100 with torch 2.11, in ms, one kernel
and each by itself (scripts/benchmarks/bench_attention.py): 7.3 and 4.1 for one sequence, 4.4 and
2.8 for two, 2.46 and 2.50 for 8 of 1,024 tokens, 1.6 and 4.6 for 32, 1.9 and 19 for 128.
"""
GROUPED = kernel is not None and "enable_gqa" in inspect.signature(kernel).parameters
"""Whether the kernel takes fewer heads of keys than of queries, as it does from torch 2.13 on."""


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes query [1, H, T, D], key and value [1, H_kv, T, D]."""
    heads, width = query.shape[1], query.shape[3]
    return (
        query.is_cuda
        and kernel is not None
        and flash(query)
        and len({dtype_of(x) for x in (query, key, value)}) == 1
        and query.shape[0] == key.shape[0] == 1
        and query.shape[2] == key.shape[2]
        and key.shape == value.shape
        and heads % key.shape[1] == 0
        and key.shape[3] == width
        and width % 8 == 0
    )


def flash(query: Tensor) -> bool:
    """Whether FlashAttention takes query [B, H, T, D], on a GPU."""
    half = dtype_of(query) in HALF
    return half and query.shape[3] <= LARGEST_HEAD and able(query.device)


def pays(lengths: list[int], window: int | None) -> bool:
    """Whether one kernel is faster for a row of sequences of these lengths than one for each.

    sdpa has no kernel for a window: it takes a T × T mask for a sequence that is longer.
    """
    return sum(lengths) < LONG * len(lengths) or (window is not None and window < max(lengths))


@cache
def able(device: torch.device) -> bool:
    """Whether the GPU is one that FlashAttention is made for: Ampere or newer."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def dtype_of(x: Tensor) -> torch.dtype:
    """In which dtype attention computes: autocast would cast the arguments of sdpa, too."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention within each sequence of a packed row -> [1, T, H, D].

    query [1, H, T, D]; key, value [1, H_kv, T, D]
    lengths  tokens of each sequence; their sum is T
    window   how many tokens each sees, itself included; None for all before it
    scale    of the scores; None for 1 / √D
    """
    groups: dict[str, Any] = {"enable_gqa": True} if GROUPED else {}
    if not GROUPED and (many := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(many, 1) for x in (key, value))
    q, k, v = (x.to(dtype_of(x))[0].transpose(0, 1) for x in (query, key, value))
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = to_device(ends, q.device)
    longest = max(lengths)
    before = -1 if window is None or window >= longest else window - 1
    found: Any = kernel(
        q, k, v, ends, ends, longest, longest, scale=scale, window_size=(before, 0), **groups
    )
    out: Tensor = found[None]
    return out


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch's `varlen_attn` from its definition, on any device: one T × T mask.

    query [T, H, D]; key, value [T, H_kv, D]; cu_seq_q = cu_seq_k int32 [sequences + 1], from 0 on;
    window_size (left, right): how far a token sees, -1 for no bound. Raises ValueError for what the
    kernel would refuse.
    """
    many, left_over = divmod(query.shape[1], key.shape[1])
    if left_over or (many > 1 and not enable_gqa):
        raise ValueError(f"{query.shape[1]} heads of queries, {key.shape[1]} of keys")
    lengths = cu_seq_q.diff().long()
    if not torch.equal(cu_seq_q, cu_seq_k) or int(cu_seq_q[-1]) != len(query):
        raise ValueError(f"sequences end at {cu_seq_q.tolist()}, and there are {len(query)} tokens")
    if int(lengths.max()) != max_q or max_q != max_k or cu_seq_q.dtype != torch.int32:
        raise ValueError(f"the longest of {lengths.tolist()} tokens is not {max_q}")
    owner = torch.repeat_interleave(lengths)
    at = torch.arange(len(query), device=query.device)
    distance = at[:, None] - at
    seen = owner[:, None] == owner
    left, right = window_size
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    key, value = (x.repeat_interleave(many, 1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * (scale or query.shape[2] ** -0.5)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value)
